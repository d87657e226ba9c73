"""LibriSpeech (OpenSLR 12) as Kaldi data directories.

    python ../local/prepare.py --corpus LibriSpeech --out data

Reads CORPUS/{train-clean-100,train-clean-360,train-other-500,dev-clean,dev-other,test-clean,test-other}/SPEAKER/CHAPTER/
{*.flac,SPEAKER-CHAPTER.trans.txt}; writes OUT/train (of those of the three training parts that are there),
OUT/dev (both dev parts), OUT/{dev,test}_{clean,other}, each {wav.scp,text,utt2spk,utt2lang}.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from funasr_mooer.data.kaldi_dir import Utterance, write_kaldi_dir
from funasr_mooer.errors import DataError, MooerError

TRAIN = ("train-clean-100", "train-clean-360", "train-other-500")
SPLITS = {  # Kaldi directory -> parts of the corpus
    "train": TRAIN,
    "dev": ("dev-clean", "dev-other"),
    **{part.replace("-", "_"): (part,) for part in ("dev-clean", "dev-other", "test-clean", "test-other")},
}


def find_utterances(part: Path) -> Iterator[Utterance]:
    """The utterances of one part, such as dev-clean."""
    tables = sorted(part.glob("*/*/*.trans.txt"))
    if not tables:
        raise DataError(f"{part}: no SPEAKER/CHAPTER/*.trans.txt; is it unpacked whole?")
    for table in tables:
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
            utt_id, _, text = line.partition(" ")
            audio = table.with_name(f"{utt_id}.flac")
            if not text.strip() or not audio.is_file():
                raise DataError(f"{table}:{number}: utt {utt_id} has no text or no {audio.name}")
            yield Utterance(
                utt_id, str(audio.resolve()), {"text": text.strip()}, speaker=utt_id.split("-")[0], lang="en"
            )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="LibriSpeech, unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data directories")
    args = parser.parse_args()
    try:
        if not any((args.corpus / part).is_dir() for part in TRAIN):
            raise DataError(f"--corpus {args.corpus}: none of {', '.join(TRAIN)} is there; unpack OpenSLR 12")
        for split, parts in SPLITS.items():
            parts = [part for part in parts if split != "train" or (args.corpus / part).is_dir()]
            utterances = [utterance for part in parts for utterance in find_utterances(args.corpus / part)]
            write_kaldi_dir(args.out / split, utterances)
            speakers = len({utterance.speaker for utterance in utterances})
            print(f"{split:<12} {len(utterances)} utts, {speakers} speakers | {', '.join(parts)}")
    except MooerError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
