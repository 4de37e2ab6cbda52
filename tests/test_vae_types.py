"""Bounds with latents refuse networks of another shape, and take any floating type of data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vdm_jax import hvae, vae
from vdm_jax.gaussian import Normal

X = jnp.asarray(np.random.RandomState(0).normal(size=(4, 3)), jnp.float32)
KEY = jax.random.key(1)


def encoder(x):
    return Normal(0.5 * x, var=jnp.full_like(x, 0.4))


def decoder(z):
    return 0.8 * z


def likelihood(mean):
    return Normal(mean, var=0.5)


def conditional(z):
    return Normal(z, var=jnp.ones_like(z))


def model(encode=encoder, decode=decoder):
    return hvae.top_down((3,), [lambda z, x: encode(x), lambda z, x: encode(x)], [conditional], decode)


FUNCTIONS = {
    "vae.bound": lambda x: vae.bound(encoder, decoder, likelihood, KEY, x).total,
    "vae.importance_weighted_bound": lambda x: vae.importance_weighted_bound(
        encoder, decoder, likelihood, KEY, x, samples=2
    ),
    "hvae.bound": lambda x: hvae.bound(model(), likelihood, KEY, x).total,
    "hvae.importance_weighted_bound": lambda x: hvae.importance_weighted_bound(model(), likelihood, KEY, x, samples=2),
    "bottom_up": lambda x: (
        hvae.bound(hvae.bottom_up((3,), [encoder, encoder], [conditional], decoder), likelihood, KEY, x).total
    ),
}


QUICK = ["vae.importance_weighted_bound", "bottom_up"]
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FUNCTIONS]


def test_results_for_any_type_of_data_are_float32():
    with jax.numpy_dtype_promotion("standard"):
        for name, function in FUNCTIONS.items():
            for x in (X.astype(jnp.bfloat16), X.astype(jnp.float16), np.asarray(X, np.float64)):
                assert jax.eval_shape(lambda f=function, x=x: f(x)).dtype == jnp.float32, (name, x.dtype)
            with jax.enable_x64(True):
                jax.eval_shape(function, X)


@pytest.mark.parametrize("name", EACH)
def test_the_type_of_the_data_does_not_matter(name):
    data = (X, X.astype(jnp.bfloat16), X.astype(jnp.float16))
    with jax.numpy_dtype_promotion("standard"):
        reference, coarse, half = jax.jit(lambda *data: [FUNCTIONS[name](x) for x in data])(*data)
    np.testing.assert_allclose(coarse, reference, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(half, reference, rtol=0.01, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_data_and_float64_computations_give_the_same(name):
    reference = np.asarray(FUNCTIONS[name](X))
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(FUNCTIONS[name](np.asarray(X, np.float64)), reference, rtol=1e-6)
        with jax.enable_x64(True):
            np.testing.assert_allclose(FUNCTIONS[name](X), reference, rtol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty_and_integer_batches_are_refused(name):
    with pytest.raises(ValueError, match=r"shape \(0, 3\)"):
        FUNCTIONS[name](X[:0])
    with pytest.raises(TypeError, match="normalize"):
        FUNCTIONS[name](jnp.zeros((4, 3), jnp.uint8))


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda x: Normal(0.5 * x[:1], var=jnp.ones((1, 3))), ValueError, r"\(1, 3\).*batch of 4"),
        (lambda x: Normal(0.5 * x, var=jnp.ones((3,))), ValueError, r"variance \(3,\)"),
        (lambda x: 0.5 * x, TypeError, r"gaussian\.Normal"),
    ],
)
def test_encoders_of_other_shapes_are_refused(broken, error, message):
    with pytest.raises(error, match=message):
        vae.bound(broken, decoder, likelihood, KEY, X)
    with pytest.raises(error, match=message):
        hvae.bound(model(encode=broken), likelihood, KEY, X)


def test_decoders_of_other_shapes_are_refused():
    for broken in (lambda z: z[:1], lambda z: z.sum()):
        with pytest.raises(ValueError, match="decoder returned shapes"):
            vae.bound(encoder, broken, likelihood, KEY, X)
        with pytest.raises(ValueError, match="decoder returned shapes"):
            hvae.bound(model(decode=broken), likelihood, KEY, X)
    with pytest.raises(TypeError, match="log_prob"):
        vae.bound(encoder, decoder, lambda mean: mean, KEY, X)


def test_static_numbers_may_be_arrays():
    call = lambda samples: vae.importance_weighted_bound(encoder, decoder, likelihood, KEY, X, samples=samples)  # noqa: E731
    array = jnp.asarray(2)
    assert jax.eval_shape(lambda: call(array)) == jax.eval_shape(lambda: call(2))


def sharded(name, check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(FUNCTIONS[name], mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)


@pytest.mark.parametrize("check_vma", [True, False])
def test_every_function_is_traced_under_shard_map(check_vma):
    for name in FUNCTIONS:
        assert jax.eval_shape(sharded(name, check_vma), X).shape == (4,), name


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "name", [name if name == "vae.bound" else pytest.param(name, marks=pytest.mark.slow) for name in FUNCTIONS]
)
def test_under_shard_map_each_device_has_its_own_examples(name, check_vma):
    found = jax.jit(sharded(name, check_vma))(X)
    expected = jax.jit(lambda *parts: [FUNCTIONS[name](part) for part in parts])(X[:2], X[2:])
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=2e-6)


def test_a_likelihood_that_would_broadcast_is_refused():
    for narrow in (lambda z: z[:, :1], lambda z: z.sum(1)):
        with pytest.raises(ValueError, match=r"shape \((1,)?\) for x of shape \(3,\)"):
            vae.bound(encoder, narrow, likelihood, KEY, X)
        with pytest.raises(ValueError, match=r"shape \((1,)?\) for x of shape \(3,\)"):
            hvae.bound(model(decode=narrow), likelihood, KEY, X)


def test_codes_and_data_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"z has shape \(1,\)"):
        vae.aggregated_posterior_log_prob(encoder(X), X[0, :1])
    with pytest.raises(ValueError, match=r"data has shape \(1, 3\)"):
        vae.optimal_mean_decoder(encoder(X), X[:1], X[0])


def test_alternation_may_begin_alike_on_every_device_and_keeps_its_type():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def go(x):
        return vae.variational_em(lambda theta: theta * x.sum(), jnp.sin, jnp.ones(()), iterations=2)[0][None]

    mapped = jax.shard_map(go, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_allclose(
        mapped(X), [np.sin(np.sin(h.sum()) * h.sum()) for h in np.split(np.asarray(X), 2)], rtol=1e-4
    )
    half = vae.variational_em(lambda a: a.astype(jnp.float32), jnp.sin, X[0].astype(jnp.bfloat16), iterations=2)[0]
    assert half.dtype == jnp.bfloat16
