"""WenetSpeech as Kaldi data directories with segments.

    python ../local/prepare.py --corpus WenetSpeech --out data --subset M

Reads CORPUS/WenetSpeech.json (1 GB and more, one recording at a time) and names CORPUS/audio/**/*.opus; writes
OUT/{train,dev,test_net,test_meeting}/{wav.scp,segments,text,utt2spk,utt2lang}. Train is the chosen subset: S lies in M, M in L.
Recordings whose file is not there are counted and left out; more than one in a hundred stop it.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from funasr_mooer.data.kaldi_dir import replace_dir
from funasr_mooer.errors import DataError, MooerError

TABLES = ("wav.scp", "segments", "text", "utt2spk", "utt2lang")
TESTS = {"DEV": "dev", "TEST_NET": "test_net", "TEST_MEETING": "test_meeting"}  # the corpus' name -> directory
BLOCK = 1 << 20  # characters read at a time
MAX_MISSING = 0.01  # of the recordings


def read_audios(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of the list "audios", one at a time: the file does not fit into memory comfortably."""
    if not file.is_file():
        raise DataError(f"{file} is missing; --corpus must hold WenetSpeech.json and audio/")
    decoder, separators = json.JSONDecoder(), " \t\r\n,"
    with file.open(encoding="utf-8") as text:
        buffer = _until_list(text, file)
        while True:
            buffer = buffer.lstrip(separators)
            if buffer.startswith("]"):
                return
            try:
                audio, end = decoder.raw_decode(buffer)
            except json.JSONDecodeError:
                more = text.read(BLOCK)
                if not more:
                    raise DataError(f"{file}: ends, or is no JSON, after {buffer[:60]!r}") from None
                buffer += more
                continue
            buffer = buffer[end:]
            yield audio


def _until_list(text: IO[str], file: Path) -> str:
    """What follows ``"audios": [``."""
    buffer = ""
    while block := text.read(BLOCK):
        buffer += block
        _, key, rest = buffer.partition('"audios"')
        if key and "[" in rest:
            return rest.partition("[")[2]
    raise DataError(f'{file}: no list "audios"')


def write_dirs(corpus: Path, out: Path, subset: str) -> tuple[Counter, Counter]:
    """Write all directories in one pass; segments per directory, and recordings (found, missing)."""
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    wanted = {subset: "train", **TESTS}
    tables = {}
    for name in wanted.values():
        (partial / name).mkdir(parents=True)
        tables[name] = {table: (partial / name / table).open("w", encoding="utf-8") for table in TABLES}
    segments, recordings = Counter(), Counter()
    for audio in read_audios(corpus / "WenetSpeech.json"):
        path = (corpus / audio["path"]).resolve()
        recordings["found" if path.is_file() else "missing"] += 1
        if path.is_file():
            for name, chosen in _by_directory(audio, wanted).items():
                _write(tables[name], audio["aid"], path, chosen)
                segments[name] += len(chosen)
    for files in tables.values():
        for file in files.values():
            file.close()
    if recordings["missing"] > MAX_MISSING * recordings.total():
        raise DataError(f"{corpus}/audio: {recordings['missing']} of {recordings.total()} recordings are not there")
    for name in wanted.values():
        if not segments[name]:
            raise DataError(f"{corpus}/WenetSpeech.json: no segment for {name}")
        replace_dir(partial / name, out / name)
    partial.rmdir()
    return segments, recordings


def _by_directory(audio: dict[str, Any], wanted: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Segments of a recording for each directory."""
    found: dict[str, list[dict[str, Any]]] = {}
    for segment in audio["segments"]:
        for subset in segment["subsets"]:
            if subset in wanted:
                found.setdefault(wanted[subset], []).append(segment)
    return found


def _write(files: dict[str, IO[str]], aid: str, path: Path, segments: list[dict[str, Any]]) -> None:
    files["wav.scp"].write(f"{aid} {path}\n")
    for segment in segments:
        sid = segment["sid"]
        files["segments"].write(f"{sid} {aid} {segment['begin_time']:.3f} {segment['end_time']:.3f}\n")
        files["text"].write(f"{sid} {segment['text'].strip()}\n")
        files["utt2spk"].write(f"{sid} {aid}\n")  # speakers are not known
        files["utt2lang"].write(f"{sid} zh\n")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with WenetSpeech.json and audio/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data directories")
    parser.add_argument("--subset", choices=("L", "M", "S"), default="L", help="for training (%(default)s)")
    args = parser.parse_args()
    try:
        segments, recordings = write_dirs(args.corpus, args.out, args.subset)
    except MooerError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for name, count in segments.items():
        print(f"{name:<12} {count} utts")
    print(f"ready        {recordings['found']} recordings | {recordings['missing']} missing left out")


if __name__ == "__main__":
    main()
