"""An index of many millions of utterances is a matter of mapped files, not of memory."""

import json
import time
import tracemalloc

import numpy as np
import pytest

from funasr_mooer.data.corpus import Corpus, DatasetConf
from funasr_mooer.data.features import Features
from funasr_mooer.data.loader import build_sampler
from funasr_mooer.data.pack_format import RECORD, VERSION
from funasr_mooer.data.shards import Pack

BLOCK = 1 << 20


def write_index(folder, count, fingerprint):
    """A pack without audio."""
    rng = np.random.default_rng(0)
    seconds = np.clip(rng.lognormal(1.9, 0.5, BLOCK), 1, 15)
    records = np.zeros(BLOCK, RECORD)
    records["samples"], records["token_count"], records["fields"] = seconds * 16000, 1 + 2 * seconds, 1
    with open(folder / "index.bin", "wb") as file:
        for start in range(0, count, BLOCK):
            file.write(records[: min(BLOCK, count - start)].tobytes())
    (folder / "tokens.bin").touch()
    meta = {"version": VERSION, "fields": ["text"], "langs": [""], "utterances": count, "tokens": 0, "hours": 1.0}
    meta |= {"tokenizer": fingerprint, "shards": [], "shard_bytes": []}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("millions", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_any_batch_of_a_large_corpus_comes_soon_and_from_little_memory(fakes, tmp_path, millions):
    count, features = millions * 1_000_000, Features()
    write_index(tmp_path, count, fakes.Tokenizer.fingerprint)
    tracemalloc.start()
    start = time.perf_counter()
    corpus = Corpus(DatasetConf(), [Pack(tmp_path)], features, fakes.Tokenizer(), fakes.Prompt())
    sampler = build_sampler(corpus, lambda samples: features.num_frames(samples) // 2)
    first = sampler.batch(0, 0)
    seconds = time.perf_counter() - start
    last = sampler.batch(3, sampler.num_batches - 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sampler) == count
    assert len(np.unique(first)) == len(first)
    assert last.max() < count
    assert seconds < 0.5 + millions / 5  # 1 s per 60 million on a machine that does nothing else
    assert peak < 200e6
    (tmp_path / "index.bin").unlink()
