"""Decode a corpus with a model directory: Kaldi text files and every detail as JSON lines."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funasr_mooer.bin.cli import positive, run
from funasr_mooer.config import load_config, override
from funasr_mooer.errors import DataError
from funasr_mooer.score.sweep import Way, read_sweep

if TYPE_CHECKING:
    from funasr_mooer.border.parts import Parts
    from funasr_mooer.border.transcribe import Clip

log = logging.getLogger(__name__)

EXAMPLES = """examples:
  funasr-mooer decode --model exp/mooer/best --data data/test --task asr --out exp/mooer/decode/test
  funasr-mooer decode --model exp/mooer/best --data data/test --task ast --out OUT --config conf/decode/mooer.yaml
  funasr-mooer decode --model exp/mooer/best --data data/test --task asr --out OUT ++num_beams=1
  funasr-mooer decode --model exp/u2pp/best --data data/test --out OUT --sweep conf/decode/u2pp_moe_sweep.yaml

writes OUT/text (and OUT/text.en for tasks of two answers), OUT/result.jsonl and OUT/decode.json (time, RTF); of a sweep
OUT/ROW.COLUMN/text and so on
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, ways = parse(argv)
    from funasr_mooer.train import launch, nodes

    outs = [Path(args.out) / way.folder for way in ways]
    if args.nproc > 1 and not nodes.is_launched():
        code = launch.launch([sys.executable, "-m", "funasr_mooer.bin.decode", *argv], args.nproc)
        if code == 0:
            for way, out in zip(ways, outs):
                parts = [out / f"part-{rank}.json" for rank in range(args.nproc)]
                write(out, [json.loads(part.read_text("utf-8")) for part in parts], way, args)
                for part in parts:
                    part.unlink()
        return code
    launch.end_with_parent()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for way, out, done in zip(ways, outs, decode(args, ways, rank, world)):
        out.mkdir(parents=True, exist_ok=True)
        if world > 1:
            (out / f"part-{rank}.json").write_text(json.dumps(done, ensure_ascii=False), "utf-8")
        else:
            write(out, [done], way, args)
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Way]]:
    """The command line, and the ways to decode: one, or those of ``--sweep``.

    Settings are those of ``--config``, under the ``++key=value`` ones, under those of the sweep.
    """
    parser = argparse.ArgumentParser(
        prog="funasr-mooer decode",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory, such as EXP/best")
    parser.add_argument("--data", required=True, metavar="DIR", help="Kaldi directory or pack")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--task", help="what is asked (asr, ast, ...); not needed for models of one task")
    parser.add_argument("--config", metavar="YAML", help="decoding settings, such as conf/decode/mooer.yaml")
    parser.add_argument("--sweep", metavar="YAML", help="rows and columns of settings; each pair is decoded")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or musa")
    parser.add_argument("--nproc", type=positive, default=1, help="processes; each decodes a share")
    parser.add_argument("--batch-s", type=float, default=120, help="seconds of audio per batch, padding included")
    parser.add_argument("--max-utts", type=positive, default=32, help="utterances per batch")
    parser.add_argument("--max-bad", type=float, default=0.01, help="share of utterances that may be unreadable")
    parser.add_argument(
        "--allow-pipes", action="store_true", help="run commands that wav.scp holds; only if you trust it"
    )
    args, rest = parser.parse_known_args(argv)
    from funasr_mooer.mooer.generate import DECODE_KEYS
    from funasr_mooer.u2pp_moe.search import DECODE_KEYS as U2PP_DECODE_KEYS

    settings = load_config(args.config) if args.config else {}
    settings = override(settings, rest, "decoding settings")
    ways = read_sweep(args.sweep, settings) if args.sweep else [Way("", "", settings)]
    for way in ways:
        check_settings(way.settings, (*DECODE_KEYS, *U2PP_DECODE_KEYS))
    return args, ways


def check_settings(settings: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse decoding settings that are not ``known``.

    Raises:
        ConfigError: names the first one, and what it may have been meant to be.
    """
    from funasr_mooer.config import suggest
    from funasr_mooer.errors import ConfigError

    for key in settings:
        if key not in known:
            raise ConfigError(f"decoding setting '{key}' is unknown{suggest(key, known)}")


def decode(args: argparse.Namespace, ways: Sequence[Way], rank: int, world: int) -> Iterator[dict[str, Any]]:
    """This process's share of the corpus, once for each way: every world-th clip by length, so that shares take as long."""
    from funasr_mooer.border.build import load_model
    from funasr_mooer.border.transcribe import clips

    every = clips(args.data, args.allow_pipes)
    share = sorted(every, key=lambda clip: (-clip.seconds, clip.utt_id))[rank::world]
    model = load_model(args.model, args.device)
    task = {"task": model.check_task(args.task)} if hasattr(model, "check_task") else {}
    for way in ways:
        check_settings(way.settings, model.decode_keys)  # each system has its own
    for way in ways:
        yield decode_share(args, model, share, {**way.settings, **task})


def decode_share(
    args: argparse.Namespace, model: Parts, share: Sequence[Clip], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Results of these clips, those that have none, and the time from the first file to the last text."""
    from funasr_mooer.border.transcribe import transcribe

    problems: list[str] = []
    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    told = started
    for result in transcribe(
        model,
        share,
        args.batch_s,
        args.max_utts,
        on_problem=lambda utt_id, error: problems.append(f"{utt_id}: {error}"),
        **settings,
    ):
        results.append(result)
        now = time.perf_counter()
        if now - told > 5:
            left = (now - started) / len(results) * (len(share) - len(results))
            log.info("decoded %d of %d | left %.0f s", len(results), len(share), left)
            told = now
    return {
        "results": results,
        "problems": problems,
        "audio_s": sum(clip.seconds for clip in share if math.isfinite(clip.seconds)),
        "seconds": time.perf_counter() - started,
    }


def write(out: Path, parts: Sequence[dict[str, Any]], way: Way, args: argparse.Namespace) -> None:
    """Join the shares: results sorted by utterance, one text file per answer, and the time it took.

    ``seconds`` is the sum over processes, without loading the model: the RTF is that of one process.

    Raises:
        DataError: more utterances than ``--max-bad`` allows could not be read.
    """
    from funasr_mooer.border.transcribe import answers_only

    results = sorted((result for part in parts for result in part["results"]), key=lambda result: result["key"])
    problems = [problem for part in parts for problem in part["problems"]]
    for problem in problems:
        log.warning("not decoded: %s", problem)
    if len(problems) > args.max_bad * (len(results) + len(problems)):
        raise DataError(
            f"{args.data}: {len(problems)} of {len(results) + len(problems)} utterances could not be decoded, "
            f"--max-bad allows {args.max_bad:g}: {problems[0]}"
        )
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(result, ensure_ascii=False) for result in results]
    (out / "result.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")
    fields = {field for result in results for field in answers_only(result)} or {"text"}
    for field in sorted(fields):
        rows = [f"{r['key']} {' '.join(r.get(field, '').split())}".rstrip() for r in results]
        (out / field).write_text("".join(row + "\n" for row in rows), "utf-8")
    audio_s, seconds = (sum(part[key] for part in parts) for key in ("audio_s", "seconds"))
    facts = {
        "model": str(args.model),
        "data": str(args.data),
        "task": args.task,
        "row": way.row,
        "column": way.column,
        "place": way.place,
        "settings": way.settings,
        "utterances": len(results),
        "not_decoded": len(problems),
        "audio_s": round(audio_s, 2),
        "seconds": round(seconds, 2),
        "rtf": round(seconds / max(audio_s, 1e-9), 4),
        "nproc": args.nproc,
        "device": args.device,
    }
    (out / "decode.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    log.info(
        "decoded %d utterances, %.1f s of audio in %.1f s (RTF %.3f) -> %s",
        len(results),
        audio_s,
        seconds,
        facts["rtf"],
        out,
    )


if __name__ == "__main__":
    sys.exit(main())
