"""Streaming equals the whole utterance under the same mask, whatever the pieces and the company."""

import numpy as np
import pytest
import torch

from funasr_mooer.border.build import build_model
from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.u2pp_moe.feature_stream import FeatureStream
from funasr_mooer.u2pp_moe.search import METHODS, DecodeConf
from funasr_mooer.u2pp_moe.streaming import Streamer


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize(("lfr_m", "lfr_n"), [(1, 1), (7, 6), (5, 3)])
def test_features_of_pieces_are_those_of_the_whole(lfr_m, lfr_n):
    features = Features({"n_mels": 16, "lfr_m": lfr_m, "lfr_n": lfr_n})
    for samples in (100, 400, 900, 7777):
        wave = noise(samples)
        for size in (1, 160, 333, 4000, 8000):
            if size == 1 and samples > 900:
                continue
            stream = FeatureStream(features)
            starts = range(0, samples, size)
            found = [stream.push(wave[s : s + size], final=s + size >= samples) for s in starts]
            torch.testing.assert_close(torch.cat(found), features(wave), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "chunk", "left"),
    [*((method, 4, 2) for method in METHODS), *(("ctc_greedy_search", *c) for c in ((1, -1), (5, 0), (16, -1)))],
)
def test_a_stream_ends_with_what_the_whole_utterance_gives(model, method, chunk, left):
    conf = DecodeConf(method, chunk, left, beam_size=3, blank_penalty=1.0)
    wave = noise(14000)
    feats = model.features(wave)
    (whole,) = model.decode_with(conf, feats[None], torch.tensor([len(feats)]))
    with torch.no_grad():
        masked, _ = model.encoder(feats[None], torch.tensor([len(feats)]), chunk, left)
    streamer = Streamer(model, conf)
    for size in (700, 5000, 14000):
        stream = streamer.open()
        for start in range(0, len(wave), size):
            (result,) = streamer.feed([stream], [wave[start : start + size]], final=start + size >= len(wave))
        torch.testing.assert_close(torch.cat(stream.segment.encoder_out), masked[0], atol=1e-5, rtol=1e-5)
        assert result["is_final"]
        assert (result["tokens"], result["timestamp"]) == (whole["tokens"], whole["timestamp"])
        assert result["score"] == pytest.approx(whole["score"], abs=1e-4)


def test_streams_in_one_batch_do_not_hear_each_other(model):
    conf = DecodeConf("ctc_prefix_beam_search", 4, 2, beam_size=3)
    waves = [noise(samples, seed) for seed, samples in enumerate((9000, 4000, 12345))]
    streamer = Streamer(model, conf)
    alone = []
    for wave in waves:
        stream = streamer.open()
        streamer.feed([stream], [wave], final=True)
        alone.append(torch.cat(stream.segment.encoder_out))
    streams, position = [streamer.open() for _ in waves], [0, 0, 0]
    rng = np.random.default_rng(0)
    while not all(stream.closed for stream in streams):
        chosen = [i for i in range(3) if not streams[i].closed and rng.random() < 0.7]
        sizes = [int(rng.integers(1, 3000)) for _ in chosen]
        pieces = [waves[i][position[i] : position[i] + n] for i, n in zip(chosen, sizes)]
        for i, n in zip(chosen, sizes):
            position[i] += n
        streamer.feed([streams[i] for i in chosen], pieces, [position[i] >= len(waves[i]) for i in chosen])
    for stream, expected in zip(streams, alone):
        torch.testing.assert_close(torch.cat(stream.segment.encoder_out), expected, atol=1e-5, rtol=1e-5)


def test_the_model_keeps_nothing(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    members = {name: set(vars(module)) for name, module in model.named_modules()}
    streamer = Streamer(model)
    streamer.feed([streamer.open()], [noise(16000)])
    assert members == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_caches_of_long_streams_do_not_grow(model):
    streamer = Streamer(model, DecodeConf(decoding_chunk_size=4, num_decoding_left_chunks=2))
    stream = streamer.open()
    for second in range(3):
        streamer.feed([stream], [noise(16000, second)])
        assert stream.segment.att_cache.shape[2] <= 8
        assert len(stream.frontend.samples) < 400 + 160
        assert len(stream.feats) < streamer.window


def test_bytes_integers_and_tensors_are_the_same_sound(model):
    wave = np.round(noise(8000) * 32767).astype(np.int16)
    streamer, results = Streamer(model, DecodeConf("ctc_greedy_search", 4)), []
    for piece in (wave, wave.tobytes(), wave / np.float32(32768), torch.from_numpy(wave.astype(np.float32) / 32768)):
        stream = streamer.open()
        streamer.feed([stream], [piece], final=True)
        results.append(torch.cat(stream.segment.encoder_out))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_stream_of_nothing_ends_in_a_warning(model):
    streamer = Streamer(model)
    (result,) = streamer.feed([streamer.open()], [noise(160)], final=True)  # 10 ms
    assert result["text"] == ""
    assert "shorter than one encoder frame of 40 ms" in result["warning"]
    (result,) = streamer.feed([streamer.open()], [None])
    assert (result["text"], result["is_final"], result["quiet_ms"]) == ("", False, 0)


def test_wrong_use_is_an_error(model, config):
    streamer = Streamer(model)
    stream = streamer.open()
    with pytest.raises(DataError, match="only once"):
        streamer.feed([stream, stream], [None, None])
    with pytest.raises(DataError, match="expected int16 or float samples, found int64"):
        streamer.feed([stream], [np.arange(10)])
    with pytest.raises(DataError, match="samples up to 9000; floats lie in"):
        streamer.feed([streamer.open()], [np.full(10, 9000.0, np.float32)])
    with pytest.raises(DataError, match="a piece of features has size 3, the model takes 16"):
        streamer.feed([stream], [np.zeros((4, 3), np.float32)])
    streamer.feed([stream], [noise(100)], final=True)
    with pytest.raises(DataError, match="the stream has ended; start another one"):
        streamer.feed([stream], [noise(100)], final=True)
    config["encoder_conf"] |= {"causal": False}
    with pytest.raises(ConfigError, match="streaming needs encoder_conf.causal: true"):
        Streamer(build_model(config))
    config["encoder_conf"] |= {"use_dynamic_chunk": False}
    with pytest.raises(ConfigError, match="train it with encoder_conf.use_dynamic_chunk"):
        Streamer(build_model(config))


REFUSED = {
    "int64": ([np.arange(10)], False),
    "loud": ([np.full(10, 9000.0, np.float32)], False),
    "NaN": ([np.full(10, np.nan, np.float32)], False),
    "features of another size": ([np.zeros((4, 3), np.float32)], False),
    "a string": (["no audio"], False),
    "a piece too few": ([], False),
    "an end too few": ([noise(900)], [False]),
    "an end too many": ([noise(900)], [False, False, True]),
}


@pytest.mark.parametrize(("rest", "final"), REFUSED.values(), ids=REFUSED)
def test_a_refused_call_changes_nothing(model, rest, final):
    streamer = Streamer(model, DecodeConf("ctc_prefix_beam_search", 4, 2, beam_size=3))
    pcm = np.round(noise(9000) * 32767).astype(np.int16).tobytes()
    retried, other, once = streamer.open(), streamer.open(), streamer.open()
    for stream in (retried, once):
        streamer.feed([stream], [pcm[:3001]])  # cut within a sample
    with pytest.raises(DataError):
        streamer.feed([retried, other], [pcm[3001:12000], *rest], final)
    for stream in (retried, once):
        streamer.feed([stream], [pcm[3001:]], final=True)
    assert torch.equal(torch.cat(retried.segment.encoder_out), torch.cat(once.segment.encoder_out))


def test_bytes_may_be_cut_within_a_sample(model):
    pcm = np.round(noise(8000) * 32767).astype(np.int16).tobytes()
    streamer, outputs = Streamer(model, DecodeConf("ctc_greedy_search", 4)), []
    for size in (len(pcm), 1001):
        stream = streamer.open()
        for start in range(0, len(pcm), size):
            streamer.feed([stream], [pcm[start : start + size]], final=start + size >= len(pcm))
        outputs.append(torch.cat(stream.segment.encoder_out))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def test_a_stream_is_closed_once_and_keeps_its_settings(model):
    streamer = Streamer(model)
    stream = streamer.open()
    with pytest.raises(ConfigError, match="settings changed within a stream"):
        Streamer(model, DecodeConf(beam_size=3)).feed([stream], [noise(100)])
    streamer.feed([stream], [None], final=True)
    with pytest.raises(DataError, match="the stream has ended; start another one"):
        streamer.feed([stream], [None], final=True)


def test_a_stream_of_10_ms_through_funasrs_cache_is_an_empty_text_with_a_reason(model):
    (result,), _ = model.inference([noise(160)], cache={}, is_final=True)
    assert (result["text"], result["is_final"]) == ("", True)
    assert "shorter than one encoder frame of 40 ms" in result["warning"]
