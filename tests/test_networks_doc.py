"""The page on networks: its code runs, and its claims about the code hold."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow  # some twenty compilations
PAGE = Path(__file__).parent.parent / "docs/networks.md"


@pytest.fixture(scope="module")
def names():
    text = PAGE.read_text()
    found: dict = {"__name__": "networks_page"}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes types
            exec(code, found)
    return found


@pytest.mark.parametrize("name", ["gradient", "nnx_gradient", "equinox_gradient"])
def test_gradients_reach_the_parameters(names, name):
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(names[name]) if isinstance(leaf, jax.Array) and leaf.size)


def test_every_form_of_a_network_gives_the_same_loss(names):
    mean = names["loss"](names["params"])
    for name in ("plain_loss", "bound_loss", "sharded_loss"):
        np.testing.assert_allclose(jax.device_get(names[name]).mean(), mean, rtol=1e-5)


@pytest.mark.parametrize("name", ["nnx", "equinox", "linen"])
def test_losses_are_per_example(names, name):
    assert names[f"{name}_dropout"].shape == (4,)


def test_a_level_without_its_trailing_axes_is_found_by_both_tests(names):
    wrong, x, loss = names["wrong"], names["x_square"], names["losses"].simple_loss
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(AssertionError):
            names["check_examples"](wrong, x, names["levels"])
        with pytest.raises((TypeError, ValueError), match="ncompatible shapes"):  # from JAX: either
            jax.eval_shape(lambda x: loss(wrong, names["key"], x, names["schedule"]), names["x_test"])
        assert loss(wrong, names["key"], x, names["schedule"]).shape == (3,)  # which the loss itself cannot detect
