"""A corpus is decoded in batches of similar length, whatever kind of source its audio has."""

import logging
import math

import kaldiio
import numpy as np
import pytest

from funasr_mooer.border.transcribe import Clip, batches, clips, transcribe
from funasr_mooer.data.audio import write_wav

SAMPLES = [16000, 48000, 32000, 64000]


def corpus(tmp_path, kind):
    """A Kaldi directory of utterances of 1, 3, 2 and 4 s."""
    lines = []
    for number, samples in enumerate(SAMPLES):
        wave, file = np.full(samples, 1000, np.int16), tmp_path / f"{number}.wav"
        write_wav(file, wave)
        source = str(file)
        if kind == "ark":
            kaldiio.save_ark(f"{file}.ark", {"u": (16000, wave)}, scp=f"{file}.scp")
            source = open(f"{file}.scp", encoding="utf-8").read().split()[1]
        elif kind == "tar":
            data = file.read_bytes()
            (tmp_path / f"{number}.tar").write_bytes(b"\0" * 512 + data)
            source = f"{tmp_path}/{number}.tar:512:{len(data)}"
        elif kind.startswith("pipe"):
            source = f"cat {file} |"
        lines.append(f"utt{number} {source}\n")
    (tmp_path / "wav.scp").write_text("".join(lines))
    if kind == "pipe with utt2dur":
        (tmp_path / "utt2dur").write_text("".join(f"utt{n} {samples / 16000}\n" for n, samples in enumerate(SAMPLES)))
    return tmp_path


@pytest.mark.parametrize("kind", ["file", "ark", "tar", "pipe with utt2dur"])
def test_batches_are_bounded_and_the_longest_come_first(tmp_path, kind):
    found = clips(corpus(tmp_path, kind), allow_pipes=True)
    assert [clip.seconds for clip in found] == [1, 3, 2, 4]
    assert [[clip.utt_id for clip in batch] for batch in batches(found, 6, 32)] == [
        ["utt3"],
        ["utt1", "utt2"],
        ["utt0"],
    ]


def test_what_no_header_tells_counts_as_the_longest_that_the_model_hears(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = clips(corpus(tmp_path, "pipe"), allow_pipes=True)
    assert "4 utterances (utt0, ...) do not say how long they are" in caplog.text
    assert [clip.seconds for clip in found] == [math.inf] * 4
    known = Clip("known", 20.0, found[0].read)
    planned = batches([known, *found], 60, 32, longest_s=30)
    assert [[clip.utt_id for clip in batch] for batch in planned] == [["utt0", "utt1"], ["utt2", "utt3"], ["known"]]


class Model:
    """Says how long what it hears is, and in which company."""

    class model_conf:
        max_audio_s = 30.0

    def inference(self, waves, key):
        return [{"key": k, "text": f"{len(wave)} of {len(waves)}"} for k, wave in zip(key, waves)], {}


def test_commands_are_decoded_in_batches_that_hold_even_the_longest(tmp_path):
    found = clips(corpus(tmp_path, "pipe"), allow_pipes=True)
    results = {result["key"]: result["text"] for result in transcribe(Model(), found, batch_s=60)}
    assert results == {f"utt{n}": f"{samples} of 2" for n, samples in enumerate(SAMPLES)}
