"""Train a model from packs; the same command goes on where an earlier one was stopped or killed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funasr_mooer.bin.cli import EXIT_INTERRUPTED, positive, run

if TYPE_CHECKING:
    from funasr_mooer.train.nodes import Nodes
    from funasr_mooer.train.progress import Decoded

log = logging.getLogger(__name__)

EXAMPLES = """examples:
  funasr-mooer train --config conf/mooer.yaml --exp exp/mooer --train data/pack/train --dev data/pack/dev
  funasr-mooer train ... --nproc 8 --device cuda ++train_conf.accum_grad=4
  funasr-mooer train ... --nproc 8 --nnodes 2 --node-rank 0 --master-addr host0     # and on host1 with --node-rank 1
  torchrun --nnodes 2 --nproc-per-node 8 -m funasr_mooer.bin.train ...
  srun --ntasks 16 --gpus-per-task 1 funasr-mooer train ...

writes EXP/config.yaml, EXP/checkpoints/step-N, EXP/last, EXP/best, EXP/model (model directories), EXP/train.log,
EXP/metrics.jsonl, EXP/tensorboard and EXP/curves.png
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, overrides = parse(argv)
    from funasr_mooer.train import launch, nodes

    if not nodes.is_launched():
        place = place_of(args)
        if place.world > 1:
            return launch.launch([sys.executable, "-m", "funasr_mooer.bin.train", *argv], place.local, place)
    launch.end_with_parent()
    return 0 if train(args, overrides) else EXIT_INTERRUPTED


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and its ``++key=value`` overrides."""
    parser = argparse.ArgumentParser(
        prog="funasr-mooer train",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="the whole system, in FunASR's sections")
    parser.add_argument("--exp", required=True, metavar="DIR", help="experiment directory")
    parser.add_argument("--train", required=True, nargs="+", metavar="PACK", help="packs to train on")
    parser.add_argument("--dev", nargs="+", default=[], metavar="PACK", help="packs to validate on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or musa")
    parser.add_argument(
        "--nproc", type=positive, default=1, metavar="N", help="processes on this machine, one per device"
    )
    hosts = parser.add_argument_group("several hosts", "the same command on each; --exp on a file system they share")
    hosts.add_argument("--nnodes", type=positive, default=1, metavar="N", help="hosts, with --nproc processes each")
    hosts.add_argument("--node-rank", type=int, metavar="N", help="which of them this is, from 0")
    hosts.add_argument("--hostfile", metavar="FILE", help="instead: lines 'host slots=8', as DeepSpeed's")
    hosts.add_argument("--master-addr", metavar="HOST", help="the first host's name or address")
    hosts.add_argument("--master-port", type=int, metavar="PORT", help="a free port there (29500)")
    # What DeepSpeed's launcher adds to every command; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    # "++key=value" must be taken out first: it would count as another PACK.
    args = parser.parse_args([text for text in argv if not text.startswith("++")])
    return args, [text for text in argv if text.startswith("++")]


def place_of(args: argparse.Namespace) -> Nodes:
    """The processes of the run, and which of them belong to this host."""
    from funasr_mooer.train import launch, nodes

    if args.hostfile is not None:
        port = args.master_port or nodes.PORT
        return nodes.Nodes.of_hostfile(args.hostfile, args.node_rank, args.master_addr, port)
    port = args.master_port or (launch.free_port() if args.nnodes == 1 else nodes.PORT)
    return nodes.Nodes.alike(args.nnodes, args.node_rank, args.nproc, args.master_addr, port)


def train(args: argparse.Namespace, overrides: Sequence[str]) -> bool:
    """Build everything that the config names and train; False if training was stopped by a signal."""
    from funasr_mooer.config import load_config, section
    from funasr_mooer.data.loader import DatasetConf, build_loader
    from funasr_mooer.train.stages import read_stages

    config = load_config(args.config, overrides)
    conf, stages = read_stages(config)  # before anything that takes time
    dataset = section(DatasetConf, config.get("dataset_conf"), "dataset_conf")
    exp = Path(args.exp)

    from funasr_mooer import device as devices
    from funasr_mooer.border.build import build_model
    from funasr_mooer.model_dir import write_model_dir
    from funasr_mooer.train.engine import build_engine
    from funasr_mooer.train.loop import Trainer

    engine = build_engine(args.device, conf)
    if engine.is_main:
        keep_config(config, exp)
        log_to(exp / "train.log")
        log.info("%-12s %s on %d x %s, %s", "run", exp, engine.world, engine.device, str(engine.dtype)[6:])
    devices.seed_all(conf.seed)
    model = build_model(config)
    if conf.compile:
        model.compile_layers()
    prompt = getattr(model, "prompt", None)
    common = (model.features, model.tokenizer, prompt, model.audio_lengths)
    place = {"pin_memory": engine.device.type != "cpu", "device": engine.device}
    by_language = hasattr(model, "name_languages")
    loader = build_loader(dataset, args.train, *common, seed=conf.seed, with_languages=by_language, **place)
    if by_language:
        model.name_languages(loader.corpus.languages)
    dev = build_loader(dataset, args.dev, *common, training=False, **place) if args.dev else None
    decode = None
    if conf.decode_utts and dev is not None:
        decode = DevSample(dev.corpus.packs, conf.decode_utts, conf.decoding)
        decode.check(model)
    trainer = Trainer(model, loader, engine, conf, stages, exp, write_model_dir, dev, decode)
    finished = trainer.run()
    engine.close()
    return finished


class DevSample:
    """Decodes a fixed sample of the dev set, spread over all of it, and scores the answers.

    Args:
        packs: the dev set.
        size: utterances in the sample.
        tasks: what the model is asked, and how each task is scored: ``cer``, ``wer``, ``mer``, ``bleu``.
        batch: utterances decoded together.
    """

    def __init__(self, packs: Sequence[Any], size: int, tasks: Mapping[str, Sequence[str]], batch: int = 16):
        places = [(pack, i) for pack in packs for i in range(len(pack))]
        size = min(size, len(places))
        self.places = [places[number * len(places) // size] for number in range(size)]
        self.tasks, self.batch = tasks, batch

    def check(self, model: Any) -> None:
        """Find out before training starts whether the model has the tasks.

        Raises:
            ConfigError: it has not; its tasks are listed.
        """
        for task in self.tasks if hasattr(model, "prompt") else ():
            model.prompt.ids(task)

    def __call__(self, model: Any, rank: int, world: int) -> list[Decoded]:
        """The answers of this process's share, task by task."""
        mine = sorted(self.places[rank::world], key=lambda place: int(place[0].records["samples"][place[1]]))
        return [text for task in self.tasks for text in self._answers(model, task, mine)]

    def score(self, texts: Sequence[Decoded]) -> dict[str, float]:
        """Error rates in per cent, and BLEU; a task without utterances has none."""
        from funasr_mooer.score.bleu import bleu
        from funasr_mooer.score.error_rate import error_rate
        from funasr_mooer.train.stages import metric_names

        figures = {}
        for name, task, metric in metric_names(self.tasks):
            refs = {text.utt_id: text.ref for text in texts if text.task == task}
            hyps = {text.utt_id: text.hyp for text in texts if text.task == task}
            if refs and metric == "bleu":
                tokenise = (
                    "zh" if any("\u4e00" <= letter <= "\u9fff" for ref in refs.values() for letter in ref) else "13a"
                )
                figures[name] = bleu(refs, hyps, tokenise=tokenise, resamples=1).bleu
            elif refs:
                total = error_rate(refs, hyps, metric, resamples=1).total
                figures[name] = 100 * total.errors / max(1, total.N)
        return figures

    def _answers(self, model: Any, task: str, places: Sequence[tuple[Any, int]]) -> Iterator[Decoded]:
        """Utterances that have the task's reference, decoded in batches."""
        from funasr_mooer.train.progress import Decoded

        field = model.prompt.tasks[task].answer[0] if hasattr(model, "prompt") else "text"
        for start in range(0, len(places), self.batch):
            chosen = [(pack, i, pack.text(i)) for pack, i in places[start : start + self.batch]]
            chosen = [(pack, i, text[field]) for pack, i, text in chosen if field in text]
            answers = self._decode(model, task, [pack.samples(i) for pack, i, _ in chosen]) if chosen else []
            for (pack, i, ref), answer in zip(chosen, answers, strict=True):
                yield Decoded(task, f"{pack.path}/{pack.utt_id(i)}", ref, answer["text"])

    def _decode(self, model: Any, task: str, waveforms: Sequence[Any]) -> list[dict[str, Any]]:
        """Greedy, whatever ``decode_conf`` says: fast, and good enough to rank checkpoints."""
        from funasr_mooer.mooer.generate import decode_conf

        device = next(model.parameters()).device
        feats, lengths = (tensor.to(device) for tensor in model.features.batch(waveforms))
        if not hasattr(model, "prompt"):
            return model.decode(feats, lengths)
        # The LLM alone: with the CTC head's help one that has learnt nothing would look good.
        alone = {"num_beams": 1, "ctc_weight": 0.0}
        return model.decode(feats, lengths, task, decode_conf(model.config.get("decode_conf"), alone))


def keep_config(config: Mapping[str, Any], exp: Path) -> None:
    """Write EXP/config.yaml; name the sections that an earlier run of this experiment had otherwise."""
    from funasr_mooer.config import load_config, save_config

    path = exp / "config.yaml"
    exp.mkdir(parents=True, exist_ok=True)
    earlier = load_config(path) if path.is_file() else dict(config)
    changed = sorted(key for key in {*config, *earlier} if config.get(key) != earlier.get(key))
    if changed:
        log.warning("%-12s differs from the earlier run of %s in %s", "config", exp, ", ".join(changed))
    temporary = exp / ".config.yaml"
    save_config(config, temporary)
    os.replace(temporary, path)


def log_to(path: Path) -> None:
    """Log to a file too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
