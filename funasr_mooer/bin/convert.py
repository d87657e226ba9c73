"""Convert checkpoints of others into model directories, and back; and a dense U2++ into one with experts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from funasr_mooer.bin.cli import run

EXAMPLES = """examples:
  funasr-mooer convert mooer --release pretrained_models --weights asr_ast_mtl --out exp/released
  funasr-mooer convert mooer --release pretrained_models --weights asr --tasks asr,ast --out exp/released
  funasr-mooer convert mooer --model exp/mooer/best --release OUT        # the official layout
  funasr-mooer convert wenet --wenet wenet/exp/u2pp --out exp/u2pp       # train.yaml, units.txt, global_cmvn, final.pt
  funasr-mooer convert wenet --model exp/u2pp_moe/best --wenet OUT
  funasr-mooer convert upcycle --dense exp/u2pp/best --num-experts 8 --top-k 2 --out exp/upcycled
  funasr-mooer train ... ++encoder_conf.init=exp/upcycled ++decoder_conf.init=exp/upcycled ++ctc_conf.init=exp/upcycled
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return args.convert(args)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="funasr-mooer convert",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = top.add_subparsers(required=True, metavar="KIND")
    mooer = kinds.add_parser("mooer", help="the official MooER releases", epilog=EXAMPLES)
    mooer.add_argument(
        "--release", required=True, metavar="DIR", help="folder of the release: read, or with --model written"
    )
    mooer.add_argument("--out", metavar="MODEL_DIR", help="model directory to write")
    mooer.add_argument("--model", metavar="MODEL_DIR", help="model directory to write as a release")
    mooer.add_argument("--weights", metavar="FOLDER", help="sub-folder of adapter and LoRA: asr, ast, asr_ast_mtl")
    mooer.add_argument(
        "--tasks", metavar="A,B", help="what the model may be asked; default: what the folder's name says"
    )
    mooer.add_argument("--llm", metavar="DIR", help="the base LLM, where it does not lie in the release")
    mooer.add_argument("--attention-heads", type=int, default=4, help="of the encoder; not stored in its weights")
    mooer.set_defaults(convert=convert_mooer, parser=mooer)
    wenet = kinds.add_parser("wenet", help="WeNet's U2++ models, dense or with experts", epilog=EXAMPLES)
    wenet.add_argument(
        "--wenet", required=True, metavar="DIR", help="WeNet model directory: read, or with --model written"
    )
    wenet.add_argument("--out", metavar="MODEL_DIR", help="model directory to write")
    wenet.add_argument("--model", metavar="MODEL_DIR", help="model directory to write as WeNet's")
    wenet.add_argument(
        "--checkpoint", metavar="FILE", help="weights in --wenet; default: final.pt, or else model.safetensors"
    )
    wenet.add_argument(
        "--without-tables", action="store_true", help="leave out the position tables, as older versions of WeNet do"
    )
    wenet.set_defaults(convert=convert_wenet, parser=wenet)
    upcycle = kinds.add_parser("upcycle", help="a dense U2++ as the start of one with experts")
    upcycle.add_argument("--dense", required=True, metavar="MODEL_DIR", help="U2ppMoE without experts")
    upcycle.add_argument("--out", required=True, metavar="MODEL_DIR", help="model directory to write")
    upcycle.add_argument("--num-experts", type=int, default=8, metavar="N", help="experts per layer")
    upcycle.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per frame")
    upcycle.add_argument("--seed", type=int, default=0, help="of the routers' weights")
    upcycle.set_defaults(convert=convert_upcycle)
    return top


def convert_mooer(args: argparse.Namespace) -> int:
    """Release -> model directory, or with ``--model`` the other way round."""
    from funasr_mooer.mooer import release

    if bool(args.model) == bool(args.out):
        args.parser.error("give --out MODEL_DIR to read a release, or --model MODEL_DIR to write one")
    if args.model:
        folder = release.to_release(args.model, args.release, args.weights)
        print(f"wrote {args.release}/{folder} and {args.release}/paraformer_encoder")
        return 0
    if not args.weights:
        args.parser.error("--weights is required with --out: the sub-folder of adapter and LoRA, such as asr")
    tasks = args.tasks.split(",") if args.tasks else None
    release.to_model_dir(args.release, args.out, args.weights, tasks, args.llm, args.attention_heads)
    print(f"wrote {args.out}")
    return 0


def convert_wenet(args: argparse.Namespace) -> int:
    """WeNet directory -> model directory, or with ``--model`` the other way round."""
    from funasr_mooer.u2pp_moe import wenet

    if bool(args.model) == bool(args.out):
        args.parser.error("give --out MODEL_DIR to read WeNet's files, or --model MODEL_DIR to write them")
    if args.model:
        wenet.to_wenet(args.model, args.wenet, tables=not args.without_tables)
    else:
        wenet.to_model_dir(args.wenet, args.out, args.checkpoint)
    print(f"wrote {args.wenet if args.model else args.out}")
    return 0


def convert_upcycle(args: argparse.Namespace) -> int:
    """Dense model directory -> model directory with experts."""
    from funasr_mooer.u2pp_moe.upcycle import upcycle

    upcycle(args.dense, args.out, args.num_experts, args.top_k, args.seed)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
