"""Endpoints: which rule ends a segment, and that each segment is what its part of the audio gives alone."""

import numpy as np
import pytest
import torch

from funasr_mooer.config import section
from funasr_mooer.errors import ConfigError
from funasr_mooer.u2pp_moe.endpoint import EndpointConf, trailing_silence
from funasr_mooer.u2pp_moe.search import DecodeConf
from funasr_mooer.u2pp_moe.streaming import Streamer

CHUNK, FRAME_MS, FACTOR, WINDOW = 4, 40, 4, 19  # of the tiny model: encoder frames, ms, features per frame and chunk


@pytest.mark.parametrize(
    ("has_text", "silence_ms", "length_ms", "rule"),
    [
        (True, 900, 5000, None),
        (True, 1000, 5000, "silence_after_text_ms"),
        (False, 1000, 5000, None),
        (False, 5000, 5000, "silence_without_text_ms"),
        (True, 0, 20000, "max_segment_ms"),
    ],
)
def test_each_rule_ends_a_segment(has_text, silence_ms, length_ms, rule):
    assert EndpointConf().rule(has_text, silence_ms, length_ms) == rule
    assert EndpointConf(None, None, None).rule(has_text, silence_ms, length_ms) is None


def test_silence_is_counted_from_the_last_frame_that_is_not_blank():
    def frames(*blanks):
        return torch.tensor([[p, 1 - p] for p in blanks]).log()

    assert trailing_silence(frames(0.9, 0.1, 0.9, 0.99), 0, 0.8) == 2
    assert trailing_silence(frames(0.9, 0.9), 0, 0.8, before=3) == 5
    assert trailing_silence(frames(0.9, 0.7), 0, 0.8, before=3) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"silence_after_txt_ms": 1}, "did you mean 'silence_after_text_ms'"),
        ({"max_segment_ms": 0}, "endpoint_conf.max_segment_ms=0 must be above 0 ms; null switches the rule off"),
        ({"blank_threshold": 1}, "must lie between 0 and 1"),
    ],
)
def test_rules_that_cannot_work_are_errors(values, message):
    with pytest.raises(ConfigError, match=message):
        section(EndpointConf, values, "endpoint_conf")


@pytest.fixture
def loud(model):
    """The tiny model, which hears blanks where its input is silent and tokens where it is not."""
    speaks = {"feats": None}

    def ctc_log_probs(encoder_out, blank_penalty=0.0):
        # Random frames: a frame speaks if its first channel is large, which is a property of the frame alone.
        spoken = (encoder_out[..., 0] > speaks["threshold"]).float()
        scores = torch.full((*encoder_out.shape[:2], 7), -8.0)
        scores[..., 0] = 8.0 - 16.0 * spoken
        scores[..., 3] = 16.0 * spoken - 8.0
        return scores.log_softmax(-1)

    model.ctc_log_probs = ctc_log_probs
    return model, speaks


def stream_all(streamer, wave, size):
    stream, segments = streamer.open(), []
    for start in range(0, len(wave), size):
        (result,) = streamer.feed([stream], [wave[start : start + size]], final=start + size >= len(wave))
        segments += result["segments"]
    return result, segments


@pytest.mark.parametrize("method", ["ctc_greedy_search", "attention_rescoring"])
def test_segments_are_what_their_audio_gives_alone_at_its_place_in_the_stream(loud, method):
    model, speaks = loud
    wave = np.random.default_rng(0).normal(0, 0.1, 3 * 16000).astype(np.float32)
    feats = model.features(wave)
    with torch.no_grad():
        heard, _ = model.encoder(feats[None], torch.tensor([len(feats)]), CHUNK, 2)
    speaks["threshold"] = float(heard[0, :, 0].quantile(0.8))
    conf = DecodeConf(method, CHUNK, 2, beam_size=3)
    endpoint = EndpointConf(silence_after_text_ms=200, silence_without_text_ms=480, max_segment_ms=1000)
    streamer = Streamer(model, conf, endpoint)
    result, segments = stream_all(streamer, wave, 1600)
    assert result["is_final"]
    assert len(segments) > 2
    assert segments[-1]["endpoint"] == "end of stream" or not result["text"]
    for before, segment in zip([None, *segments], segments):
        assert before is None or before["end_ms"] <= segment["start_ms"]
        assert segment["start_ms"] % (CHUNK * FRAME_MS) == 0
        first = segment["start_ms"] // FRAME_MS * FACTOR
        frames = (segment["end_ms"] - segment["start_ms"]) // FRAME_MS
        part = feats[first : first + FACTOR * (frames - 1) + 7]
        (alone,) = model.decode_with(conf, part[None], torch.tensor([len(part)]))
        start = segment["start_ms"]
        assert segment["tokens"] == alone["tokens"]
        assert segment["timestamp"] == [[a + start, b + start] for a, b in alone["timestamp"]]
        assert segment["times"] == [time + start // FRAME_MS for time in alone["times"]]
    assert [s["text"] for s in segments] == [s["text"] for s in stream_all(streamer, wave, 48000)[1]]


def test_silence_is_dropped_and_memory_stays_small(loud):
    model, speaks = loud
    speaks["threshold"] = 1e9
    streamer = Streamer(model, DecodeConf("attention_rescoring", CHUNK), EndpointConf(silence_without_text_ms=800))
    stream = streamer.open()
    for second in range(4):
        noise = np.random.default_rng(second).normal(0, 0.1, 16000).astype(np.float32)
        (result,) = streamer.feed([stream], [noise], final=second == 3)
        assert (result["text"], result["segments"]) == ("", [])
        assert stream.segment.frames < (800 + 160) / FRAME_MS
        assert stream.segment.att_cache.shape[2] < (800 + 160) / FRAME_MS + CHUNK
    assert stream.segment.start > 0


def test_automodel_takes_endpoint_conf(loud):
    model, speaks = loud
    speaks["threshold"] = -1e9
    wave, cache, segments = np.random.default_rng(0).normal(0, 0.1, 32000).astype(np.float32), {}, []
    for start in (0, 16000):
        settings = {"decoding_chunk_size": CHUNK, "endpoint_conf": {"max_segment_ms": 800}}
        (result,), _ = model.inference([wave[start : start + 16000]], cache=cache, is_final=start > 0, **settings)
        segments += result["segments"]
    assert [segment["endpoint"] for segment in segments] == ["max_segment_ms", "max_segment_ms", "end of stream"]
    assert [segment["start_ms"] for segment in segments] == [0, 800, 1600]
    assert set(segments[0]) == {"text", "timestamp", "confidence", "start_ms", "end_ms", "endpoint"}
    with pytest.raises(ConfigError, match=r"endpoint_conf.max_ms: unknown key"):
        model.inference([wave], cache={}, endpoint_conf={"max_ms": 3})
