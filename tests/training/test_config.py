import dataclasses
import json

import pytest

from tests.training.experiments.tiny import CONFIG, Widths
from vdm_jax.training.config import TrainConfig, changed_options, differences, from_json, to_json, validate
from vdm_jax.training.runtime.errors import UserError


def test_json_round_trip_keeps_nested_options_and_tuples():
    config = dataclasses.replace(CONFIG, widths=Widths(hidden=7), scales=(3, 4, 5), learning_rate=1e-7)
    assert from_json(CONFIG, json.loads(json.dumps(to_json(config)))) == config


def test_options_that_are_gone_are_named():
    with pytest.raises(UserError, match="unknown options: depth"):
        from_json(CONFIG, {**to_json(CONFIG), "depth": 3})


def test_options_added_since_take_their_default():
    stored = to_json(dataclasses.replace(CONFIG, steps=7))
    del stored["ema_decay"]
    assert from_json(CONFIG, stored) == dataclasses.replace(CONFIG, steps=7)


def test_differences_name_what_a_resumed_run_may_not_change():
    new = dataclasses.replace(CONFIG, steps=9, log_every=1, learning_rate=0.5, widths=Widths(3))
    assert differences(to_json(CONFIG), to_json(new)) == [
        "--learning-rate: 0.001 -> 0.5",
        "--widths: {'hidden': 16} -> {'hidden': 3}",
    ]


def test_changed_options_are_written_as_a_command_line_has_them():
    new = dataclasses.replace(CONFIG, flip=True, workdir="w", widths=Widths(3), scales=(3, 4), learning_rate=0.5)
    expected = ["--learning-rate 0.5", "--flip", "--widths.hidden 3", "--scales 3 4"]
    assert changed_options(CONFIG, new) == expected
    assert changed_options(new, CONFIG)[1] == "--no-flip"
    assert changed_options(CONFIG, CONFIG) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"log_every": 0}, "--log-every must be at least 1"),
        ({"warmup_steps": -1}, "--warmup-steps must be at least 0"),
        ({"grad_clip": float("nan")}, "--grad-clip must be at least 0"),
        ({"learning_rate": 0.0}, "--learning-rate must be positive"),
        ({"ema_decay": 1.0}, r"--ema-decay must be in \[0, 1\)"),
        ({"seed": 2**32}, "--seed must be below"),
        ({"batch_size": 12, "accumulate": 2}, "--batch-size 12 .*8 device.*2 micro-batch.* multiple of 16, such as 16"),
        ({"eval_batch_size": 100}, "--eval-batch-size 100 .*8 device.* such as 104"),
    ],
)
def test_invalid_options_are_refused_with_a_remedy(options, message):
    valid = TrainConfig(batch_size=64, eval_batch_size=104)
    validate(valid, devices=8)
    with pytest.raises(UserError, match=message):
        validate(dataclasses.replace(valid, **options), devices=8)
