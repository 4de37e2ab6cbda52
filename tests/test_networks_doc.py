"""The page on networks: its code runs, and its claims about the code hold."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from scipy.signal import correlate

pytestmark = pytest.mark.slow  # some twenty compilations
PAGE = Path(__file__).parent.parent / "docs/networks.md"


@pytest.fixture(scope="module")
def names():
    text = PAGE.read_text()
    found: dict = {"__name__": "networks_page"}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # JAX's defaults
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


def test_an_nnx_module_updated_in_place_has_the_loss_of_one_made_anew(names):
    key, x_0, schedule, module = (names[name] for name in ("key", "x_0", "schedule", "module"))
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    anew = names["Nnx"](nnx.Rngs(1))
    nnx.update(anew, state)
    losses = [names["losses"].simple_loss(net, key, x_0, schedule) for net in (module, anew)]
    np.testing.assert_array_equal(*losses)
    assert losses[0].mean() < 0.9 * names["nnx_loss"].mean()  # before training


def layer(weights, name, x):
    """torch.nn.Conv2d(..., padding=1) of one image (C, H, W): its weights have shape (O, I, 3, 3)."""
    kernels, bias = (weights[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1)])
    return np.stack([correlate(padded, w, mode="valid")[0] + b for w, b in zip(kernels, bias, strict=True)])


def test_weights_of_pytorch_give_the_correlations_of_scipy(names):
    weights, x_t, t = safetensors.numpy.load(names["file"]), np.random.RandomState(0).normal(size=(3, 3, 6, 5)), 7.0
    rates = 10_000.0 ** -(np.arange(16) / 15)
    time = weights["time.weight"] @ np.r_[np.sin(t * rates), np.cos(t * rates)] + weights["time.bias"]
    hidden = [layer(weights, "conv_in", x) + time[:, None, None] for x in x_t]
    expected = np.stack([layer(weights, "conv_out", h / (1 + np.exp(-h))) for h in hidden])
    with jax.numpy_rank_promotion("allow"):
        ours = names["apply"](names["weights"], jnp.asarray(x_t, jnp.float32), jnp.full(3, t))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_its_convolutions_have_channels_last_in_a_sampler(names):
    def sample(x):
        return names["samplers"].ddim(names["pretrained"], None, x, names["few"]).x_0

    with jax.numpy_rank_promotion("allow"):
        program = str(jax.make_jaxpr(sample)(jnp.zeros((2, 3, 8, 8))))
    layouts = re.findall(r"lhs_spec=(\(.*?\)), rhs_spec=(\(.*?\)), out_spec=(\(.*?\))", program)
    assert layouts == [("(0, 3, 1, 2)", "(3, 2, 0, 1)", "(0, 3, 1, 2)")] * 2


def test_bits_per_dim_of_a_network_that_takes_timesteps_are_those_of_one_that_takes_levels(names):
    def denoiser(x_t, level):
        return names["apply"](names["weights"], x_t, level.t - 1.0)

    x_0 = names["likelihoods"].normalize(names["images"], 256)
    with jax.numpy_rank_promotion("allow"):
        bound = names["elbo"].bound(denoiser, names["key"], x_0, names["linear"], names["decoder"], terms=10)
    np.testing.assert_allclose(names["bits"], bound.total / (192 * np.log(2.0)), rtol=1e-5)


def test_the_probabilities_of_all_pixel_values_on_the_unit_interval_sum_to_one(names):
    level = names["linear"](1)
    decoder = names["OnUnitInterval"](jnp.float32(0.3), None, level)
    values = jnp.arange(256, dtype=jnp.float32) / 255
    probabilities = np.exp(jax.vmap(decoder.log_prob)(values))
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose((probabilities * values).sum(), 0.3, atol=1e-4)
    np.testing.assert_allclose((probabilities * (values - 0.3) ** 2).sum(), level.sigma**2 + 1 / 255**2 / 12, rtol=1e-2)
    assert np.isfinite(names["unit_bound"].total).all()
