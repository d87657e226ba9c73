"""Score hypotheses against references, and turn results into tables.

funasr-mooer score compute --ref data/test/text --hyp exp/decode/test/text --metric cer --out exp/result.json
funasr-mooer score align --ref data/test/text --hyp exp/decode/test/text --utt BAC009S0764W0121
funasr-mooer score published --name 'MooER-5K' --metric cer --value 1.93 --source 'MooER README' --out mooer_5k.json
funasr-mooer score table exp/*/result.json mooer_5k.json --markdown RESULTS.md --block test
funasr-mooer score sweep --ref data/test/text --hyp exp/decode/test/*/text --metric cer --name MoE --meta set=test
funasr-mooer score table exp/decode/*/*/result.json --sweep
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from funasr_mooer.bin.cli import positive, run
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.score import error_rate as rates
from funasr_mooer.score.bleu import BLEU_TOKENISERS, bleu
from funasr_mooer.score.normalise import NORMALISERS
from funasr_mooer.score.report import Report, Result, result_of, update_markdown, write_atomic
from funasr_mooer.score.sweep import SweepReport, decoded_facts

METRICS = (*rates.TOKENISERS, "bleu")


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    args.command = shlex.join(["funasr-mooer", "score", *argv])
    return args.run(args)


def compute(args: argparse.Namespace) -> int:
    """Score one test set; print the row, write result.json."""
    refs, hyps = rates.read_transcripts(args.ref), rates.read_transcripts(args.hyp)
    common: dict[str, Any] = {"allow_extra": args.allow_extra, "resamples": args.resamples, "seed": args.seed}
    facts = {"command": args.command, **dict(map(_meta, args.meta))}
    if args.metric == "bleu":
        score = bleu(refs, hyps, args.normaliser or "none", tokenise=args.tokenise, **common)
    else:
        score = rates.error_rate(refs, hyps, args.metric, args.normaliser or "basic", **common)
    if args.per_utt and isinstance(score, rates.ErrorRate):
        write_atomic(args.per_utt, per_utterance(score))
    result = result_of(score, args.name or os.path.relpath(args.hyp), args.ref, args.hyp, **facts)
    if args.out:
        result.save(args.out)
    _show(Report([result]))
    for kind, utt_ids in result.examples.items():
        print(f"{kind.replace('_', ' ')}: {' '.join(utt_ids)}{' ...' if getattr(result, kind) > len(utt_ids) else ''}")
    return 0


def sweep(args: argparse.Namespace) -> int:
    """Score what `decode --sweep` wrote: result.json beside each text; print the table."""
    refs, results = rates.read_transcripts(args.ref), []
    for hyp in args.hyp:
        score = rates.error_rate(refs, rates.read_transcripts(hyp), args.metric, args.normaliser, seed=0)
        facts = {"command": args.command, **decoded_facts(hyp), "set": "", **dict(map(_meta, args.meta))}
        results.append(result_of(score, args.name, args.ref, hyp, **facts))
        results[-1].save(os.path.join(os.path.dirname(hyp), "result.json"))
    _show(SweepReport(results))
    return 0


def table(args: argparse.Namespace) -> int:
    """Print several results as one table, and put it into a Markdown file."""
    report = (SweepReport if args.sweep else Report).load(args.results)
    _show(report)
    if bool(args.markdown) != bool(args.block):
        raise ConfigError("--markdown FILE and --block NAME go together")
    if not args.markdown:
        return 0
    changed = update_markdown(args.markdown, args.block, report, check=args.check)
    if changed and args.check:
        raise DataError(
            f"{args.markdown}: block '{args.block}' is not what these results say; run this without --check"
        )
    return 0


def align(args: argparse.Namespace) -> int:
    """Print one utterance's alignment."""
    tokens, normalise = rates.tokeniser(args.metric), rates.as_normaliser(args.normaliser)
    refs, hyps = rates.read_transcripts(args.ref), rates.read_transcripts(args.hyp)
    if args.utt not in refs:
        raise DataError(f"{args.ref}: no utt {args.utt}")
    ref, hyp = (tokens(normalise(texts.get(args.utt, ""))) for texts in (refs, hyps))
    print("\n".join(alignment(args.utt, rates.align(ref, hyp), shutil.get_terminal_size().columns)))
    return 0


def published(args: argparse.Namespace) -> int:
    """Write down somebody else's number, for a table that shows it beside ours."""
    result = Result(name=args.name, metric=args.metric, value=args.value, published=args.source)
    result.save(args.out)
    return 0


def per_utterance(score: rates.ErrorRate) -> str:
    """Tab-separated lines, worst first: utterance, rate in per cent, N, S, D, I, C."""
    worst = sorted(score.utterances.items(), key=lambda item: -item[1].errors)
    lines = [f"{utt}\t{c.rate:.2f}\t{c.N}\t{c.S}\t{c.D}\t{c.I}\t{c.C}" for utt, c in worst]
    return "\n".join(["utt\trate\tN\tS\tD\tI\tC", *lines]) + "\n"


def alignment(utt_id: str, pairs: Sequence[rates.Pair], width: int = 80) -> list[str]:
    """Lines with reference above hypothesis above marks (S, D, I), columns lined up, broken at ``width`` cells."""
    counts = rates.count(pairs)
    lines = [f"{utt_id}  {counts.rate:.2f} %  N={counts.N} S={counts.S} D={counts.D} I={counts.I} C={counts.C}"]
    ref_row, hyp_row, mark_row = heads = ("ref ", "hyp ", "    ")
    for ref, hyp in pairs:
        cells = max(_cells(ref or ""), _cells(hyp or ""))
        if _cells(ref_row) + cells + 1 > width and ref_row != heads[0]:
            lines += [ref_row, hyp_row, mark_row.rstrip()]
            ref_row, hyp_row, mark_row = heads
        mark = "I" if ref is None else "D" if hyp is None else " " if ref == hyp else "S"
        ref_row += " " + _pad(ref or "*" * cells, cells)
        hyp_row += " " + _pad(hyp or "*" * cells, cells)
        mark_row += " " + _pad(mark, cells)
    return [line.rstrip() for line in (*lines, ref_row, hyp_row, mark_row)]


def _parser() -> argparse.ArgumentParser:
    first, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "funasr-mooer score", description=first, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="compute | sweep | align | table | published")

    verb = _verb(verbs, compute)
    verb.add_argument("--ref", required=True, help="Kaldi text: utt_id words ...")
    verb.add_argument("--hyp", required=True, help="Kaldi text of the same utterances")
    verb.add_argument("--metric", required=True, choices=METRICS, help="mer: CJK characters and Latin words")
    verb.add_argument("--normaliser", help=f"{', '.join(NORMALISERS)}; default basic, for bleu none")
    verb.add_argument("--tokenise", default="13a", choices=BLEU_TOKENISERS, help="bleu: of the target language")
    verb.add_argument("--name", help="the row's name in tables; default the hypothesis file")
    verb.add_argument("--out", help="result.json to write")
    verb.add_argument("--per-utt", help="tab-separated counts per utterance to write, worst first")
    verb.add_argument(
        "--meta", nargs="+", default=[], metavar="KEY=VALUE", help="config, hardware, seed, ... to record"
    )
    verb.add_argument("--allow-extra", action="store_true", help="leave out hypotheses that have no reference")
    verb.add_argument("--resamples", type=positive, default=1000, help="of the bootstrap interval")
    verb.add_argument("--seed", type=int, default=0, help="of the bootstrap")

    verb = _verb(verbs, sweep)
    verb.add_argument("--ref", required=True, help="Kaldi text: utt_id words ...")
    verb.add_argument("--hyp", required=True, nargs="+", metavar="TEXT", help="OUT/*/text of the same utterances")
    verb.add_argument("--metric", required=True, choices=tuple(rates.TOKENISERS))
    verb.add_argument("--normaliser", default="basic", help=f"{', '.join(NORMALISERS)} (%(default)s)")
    verb.add_argument("--name", required=True, help="the model's name in the table")
    verb.add_argument("--meta", nargs="+", default=[], metavar="KEY=VALUE", help="set, seed, ... to record")

    verb = _verb(verbs, align)
    verb.add_argument("--ref", required=True)
    verb.add_argument("--hyp", required=True)
    verb.add_argument("--utt", required=True)
    verb.add_argument("--metric", default="mer", choices=list(rates.TOKENISERS))
    verb.add_argument("--normaliser", default="basic")

    verb = _verb(verbs, table)
    verb.add_argument(
        "--sweep", action="store_true", help="results of `score sweep`: models by rows, searches by columns"
    )
    verb.add_argument("results", nargs="+", metavar="RESULT.json")
    verb.add_argument("--markdown", help="file with the block to replace")
    verb.add_argument("--block", help="NAME in <!-- results: NAME --> ... <!-- end results -->")
    verb.add_argument("--check", action="store_true", help="do not write; fail if the block is out of date")

    verb = _verb(verbs, published)
    verb.add_argument("--name", required=True)
    verb.add_argument("--metric", required=True, choices=METRICS)
    verb.add_argument("--value", required=True, type=float)
    verb.add_argument("--source", required=True, help="who says so: paper, README, URL")
    verb.add_argument("--out", required=True)
    return parser


def _verb(verbs, function) -> argparse.ArgumentParser:
    verb = verbs.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
    verb.set_defaults(run=function)
    return verb


def _meta(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--meta {text}: write KEY=VALUE")
    return key, int(value) if key == "seed" and value.lstrip("-").isdecimal() else value


def _show(report: Report) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(report.terminal())


def _cells(text: str) -> int:
    """Terminal cells of a text: CJK characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _pad(text: str, cells: int) -> str:
    return text + " " * (cells - _cells(text))


if __name__ == "__main__":
    sys.exit(main())
