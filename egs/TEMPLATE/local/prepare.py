"""CORPUS as Kaldi data directories.

    python ../local/prepare.py --corpus CORPUS --out data

Reads CORPUS/{train,dev,test}/*.wav with a transcript *.txt beside each; writes OUT/{train,dev,test}/{wav.scp,text}.
This layout is only an example: everything that is particular to your corpus belongs into this file.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from funasr_mooer.data.kaldi_dir import Utterance, write_kaldi_dir
from funasr_mooer.errors import DataError, MooerError


def find_utterances(folder: Path) -> Iterator[Utterance]:
    """One Utterance for each recording; ``speaker`` and ``lang`` where the corpus tells them.

    A translation is one more text: ``{"text": transcript, "text.en": translation}``.
    """
    for wav in sorted(folder.glob("*.wav")):
        transcript = wav.with_suffix(".txt")
        if not transcript.is_file():
            raise DataError(f"{wav}: no transcript {transcript.name} beside it")
        yield Utterance(wav.stem, str(wav.resolve()), {"text": transcript.read_text(encoding="utf-8").strip()})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the corpus, unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data directories")
    args = parser.parse_args()
    try:
        for split in ("train", "dev", "test"):
            count = write_kaldi_dir(args.out / split, find_utterances(args.corpus / split))
            print(f"{split:<12} {count} utts")
    except MooerError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
