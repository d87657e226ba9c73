"""Latency figures of small streams, by hand."""

import pytest

from funasr_mooer.u2pp_moe.latency import LatencyMeter


def result(text="", segments=(), is_final=False):
    return {"text": text, "segments": list(segments), "is_final": is_final}


def test_audio_fed_at_once_has_the_latency_of_its_own_pace():
    meter = LatencyMeter(1)
    meter.fed([0], [0.5], 0.1, [result()])  # arrives at 0.5 s, done at 0.6
    meter.fed([0], [0.5], 0.7, [result("a")])  # arrives at 1.0, done at 1.7
    ended = {"timestamp": [[800, 900]]}
    meter.fed([0], [0.5], 0.1, [result("a", [ended], True)])  # arrives at 1.5, waits until 1.7, done at 1.8
    figures = meter.figures()
    assert figures["first_text_s"] == pytest.approx(1.7)
    assert figures["final_after_last_word_s"] == pytest.approx(1.8 - 0.9)
    assert figures["final_after_audio_s"] == pytest.approx(0.3)
    assert figures["rtf"] == pytest.approx(0.9 / 1.5)
    assert figures["compute_mean_ms"] == pytest.approx(300)
    assert figures["compute_max_ms"] == pytest.approx(700)


def test_parallel_streams_share_the_compute_time():
    meter = LatencyMeter(2)
    meter.fed([0, 1], [1.0, 0.5], 0.2, [result("a"), result("", (), True)])
    meter.fed([0], [1.0], 0.2, [result("a", (), True)])
    figures = meter.figures()
    assert (figures["streams"], figures["audio_s"]) == (2, 2.5)
    assert figures["rtf"] == pytest.approx(0.4 / 2.5)
    assert "final_after_last_word_s" not in figures  # no segment had words
