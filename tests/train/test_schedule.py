"""Learning rate shapes."""

import pytest

from funasr_mooer.errors import ConfigError
from funasr_mooer.train.schedule import ScheduleConf, factor


def test_log_warm_up_is_the_one_in_mooers_training_log():
    # Micro step 1000 with accumulation 2 is update 500; the published log shows 8.9966e-05 there.
    conf = ScheduleConf("log", warmup_steps=1000)
    assert 1e-4 * factor(conf, 500, 1_000_000) == pytest.approx(8.9966e-5, abs=1e-9)


def test_log_warm_up_then_decays_linearly_as_warmup_decay_lr():
    conf = ScheduleConf("log", warmup_steps=100)
    assert factor(conf, 1, 1100) == 0
    assert factor(conf, 100, 1100) == 1
    assert factor(conf, 600, 1100) == 0.5
    assert factor(conf, 1100, 1100) == 0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_linear_and_cosine_warm_up_linearly_and_end_at_the_floor(kind):
    conf = ScheduleConf(kind, warmup_steps=10, floor=0.1)
    assert factor(conf, 5, 110) == 0.5
    assert factor(conf, 10, 110) == 1
    assert factor(conf, 60, 110) == pytest.approx(0.55)
    assert factor(conf, 110, 110) == pytest.approx(0.1)
    assert factor(conf, 500, 110) == pytest.approx(0.1)


def test_constant_stays_and_warmuplr_falls_with_the_root():
    assert factor(ScheduleConf("constant", warmup_steps=4), 1, 100) == 0.25
    assert factor(ScheduleConf("constant"), 99, 100) == 1
    assert factor(ScheduleConf("warmuplr", warmup_steps=100), 400, 1000) == 0.5


def test_a_misspelt_schedule_is_an_error_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        ScheduleConf("cosin")
