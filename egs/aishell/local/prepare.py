"""AISHELL-1 (OpenSLR 33) as Kaldi data directories.

    python ../local/prepare.py --corpus data_aishell --out data

Reads CORPUS/wav/{train,dev,test}/S*/*.wav and CORPUS/transcript/aishell_transcript_v0.8.txt; writes
OUT/{train,dev,test}/{wav.scp,text,utt2spk,utt2lang}. The word spaces of the transcript are removed. A few hundred
recordings of the release have no transcript: they are left out and counted.
"""

import argparse
import sys
from pathlib import Path

from funasr_mooer.data.kaldi_dir import Utterance, write_kaldi_dir
from funasr_mooer.errors import DataError, MooerError

TRANSCRIPT = "transcript/aishell_transcript_v0.8.txt"


def read_transcript(file: Path) -> dict[str, str]:
    """utt_id -> characters."""
    if not file.is_file():
        raise DataError(f"{file} is missing; --corpus must be the folder data_aishell of OpenSLR 33, unpacked")
    rows = (line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {row[0]: "".join(row[1].split()) for row in rows if len(row) == 2}


def find_utterances(corpus: Path, split: str, transcript: dict[str, str]) -> tuple[list[Utterance], int]:
    """The split's utterances with a transcript, and how many have none."""
    folder = corpus / "wav" / split
    files = sorted(folder.glob("S*/*.wav"))
    if not files:
        packed = len(list((corpus / "wav").glob("S*.tar.gz")))
        hint = f"unpack the {packed} speakers in {corpus / 'wav'} first: for f in S*.tar.gz; do tar xzf $f; done"
        raise DataError(f"{folder}: no S*/*.wav; " + (hint if packed else "is the corpus complete?"))
    utterances = [
        Utterance(file.stem, str(file.resolve()), {"text": transcript[file.stem]}, speaker=file.parent.name, lang="zh")
        for file in files
        if file.stem in transcript
    ]
    return utterances, len(files) - len(utterances)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="data_aishell, unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data directories")
    args = parser.parse_args()
    try:
        transcript = read_transcript(args.corpus / TRANSCRIPT)
        for split in ("train", "dev", "test"):
            utterances, silent = find_utterances(args.corpus, split, transcript)
            write_kaldi_dir(args.out / split, utterances)
            speakers = len({utterance.speaker for utterance in utterances})
            print(f"{split:<12} {len(utterances)} utts, {speakers} speakers | {silent} without a transcript left out")
    except MooerError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
