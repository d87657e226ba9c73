"""Stand-ins for the tokenizer and the prompt, and a small pack."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("fakes", Path(__file__).with_name("fakes.py"))
_fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fakes)


@pytest.fixture(scope="session")
def fakes():
    return _fakes


@pytest.fixture(scope="session")
def corpus(fakes, tmp_path_factory):
    """24 utterances of 0.5 to 3 s."""
    return fakes.write_corpus(tmp_path_factory.mktemp("corpus"), [0.5 + (i * 7 % 24) / 9.2 for i in range(24)])


@pytest.fixture(scope="session")
def pack_dir(fakes, corpus):
    from funasr_mooer.data.kaldi_dir import read_kaldi_dir
    from funasr_mooer.data.pack_writer import write_pack

    write_pack(read_kaldi_dir(corpus), corpus.parent / "pack", fakes.Tokenizer(), shard_utts=10)
    return corpus.parent / "pack"
