"""Schedules by hand, decay by name, and configurations that are refused with all their problems."""

import math

import pytest

from twinformer import ConfigError
from twinformer.learning import OptimizerConfig, ScheduleConfig
from twinformer.parameters import model_parameters
from twinformer.presets import PRESETS, preset


def rates(**options):
    schedule = ScheduleConfig(**options)
    return [schedule.learning_rate(step) for step in range(schedule.total_steps)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
def test_warm_up_loses_no_step_and_reaches_the_peak(name):
    found = rates(name=name, peak=0.4, warmup_steps=4, total_steps=12, decay_steps=2)
    assert found[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-15)
    assert max(found) == pytest.approx(0.4, rel=1e-15)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
def test_without_warm_up_the_first_step_has_the_peak(name):
    assert rates(name=name, peak=0.4, total_steps=5)[0] == 0.4


def test_linear():
    found = rates(name="linear", peak=1.0, warmup_steps=1, total_steps=6, final_fraction=0.5)
    assert found == pytest.approx([1.0, 1.0, 0.875, 0.75, 0.625, 0.5], rel=1e-15)


def test_cosine():
    found = rates(name="cosine", peak=2.0, total_steps=5)
    assert found == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0], abs=1e-15)


def test_inverse_square_root():
    found = rates(name="inverse_sqrt", peak=1.0, warmup_steps=4, total_steps=16)
    assert found[3] == 1.0
    assert found[15] == 0.5


def test_warm_up_stable_decay():
    found = rates(name="wsd", peak=1.0, warmup_steps=2, total_steps=8, decay_steps=4)
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-15)


def test_after_the_end_the_last_rate_stays():
    schedule = ScheduleConfig(name="linear", peak=1.0, total_steps=5, final_fraction=0.1)
    assert schedule.learning_rate(5) == schedule.learning_rate(4) == pytest.approx(0.1)
    assert schedule.learning_rate(10**9) == schedule.learning_rate(4)


def test_all_problems_of_a_schedule_at_once():
    with pytest.raises(ConfigError) as caught:
        ScheduleConfig(name="square", peak=-1.0, warmup_steps=-1, total_steps=True, final_fraction=2.0)
    for field in ("name", "peak", "warmup_steps", "total_steps", "final_fraction"):
        assert f"{field}: expected" in str(caught.value)
    with pytest.raises(ConfigError, match="total_steps: expected at least warm-up and decay together, 12, got 10"):
        ScheduleConfig(name="wsd", warmup_steps=4, decay_steps=8, total_steps=10)
    with pytest.raises(ConfigError, match="step"):
        ScheduleConfig().learning_rate(-1)


def test_all_problems_of_an_optimizer_at_once():
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(
            name="adam", beta1=1.0, eps=0.0, weight_decay=float("nan"), clip_norm=0.0, ema_decay=1.0, decay="some"
        )
    for field in ("name", "beta1", "eps", "weight_decay", "clip_norm", "ema_decay", "decay"):
        assert f"{field}: expected" in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_decay_acts_on_matrices_and_tables_by_name(name):
    config = OptimizerConfig()
    parameters = model_parameters(preset(name))
    assert {path for path in parameters if config.decays(path)} == {
        path for path, parameter in parameters.items() if parameter.kind in ("linear", "embedding")
    }
    assert all(OptimizerConfig(decay="all").decays(path) for path in parameters)
    assert not any(OptimizerConfig(decay="none").decays(path) for path in parameters)


def test_decay_of_head_norms():
    config = OptimizerConfig()
    assert not config.decays("stack.blocks.0.attention.query_norm.weight")
    assert not config.decays("embedding.norm.weight")
    assert config.decays("head.weight")
    assert not config.decays("head.bias")
