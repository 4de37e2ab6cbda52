"""A report that would take longer than training is left to the user, with a message."""

import jax.numpy as jnp
import pytest

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.evaluation.time_budget import reason_to_defer
from vdm_jax.training.experiment import Cost
from vdm_jax.training.state import TrainState


def saved(images_per_second, seconds):
    notes = {"training_images_per_second": images_per_second, "seconds": seconds}
    return Saved(TrainState(jnp.asarray(7), {}, {}, ()), notes, [])


@pytest.mark.parametrize(
    ("rate", "seconds", "late"),
    [
        (1000.0, 10.0, False),  # 360 images x 900 passes at 3,000 passes a second: 108 s
        (300.0, 10.0, True),  # 360 s, above the five minutes that are always allowed
        (300.0, 400.0, False),  # but shorter than training
        (None, 10.0, False),  # no training in this process: the speed is unknown
    ],
)
def test_the_report_may_take_as_long_as_the_training(tiny, rate, seconds, late):
    run = tiny()
    run = run._replace(experiment=run.experiment._replace(cost=Cost(evaluate=900, sample=0)))
    reason = reason_to_defer(run, saved(rate, seconds))
    assert (reason is not None) == late
    if reason:
        assert "vdm-jax evaluate tiny" in reason
        assert "6:00" in reason
