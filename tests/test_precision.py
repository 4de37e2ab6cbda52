"""No equation multiplies matrices below the highest precision, which a test of numbers on a CPU could not notice.

A product at default precision is off by 1e-3 on GPUs (TensorFloat-32) and by 1e-2 on TPUs (bfloat16). The programs of
all public functions under vmap, and of their gradients, are searched for products; the networks in them contain no
products.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.tree_util import Partial

from tests.test_transforms import BATCH, CONTINUOUS, DISTRIBUTIONS, GUARDED, HOST, KEYS, LOW, POINT, ROWS, SCHEDULE
from vdm_jax import closed_form, losses, probability_flow, samplers
from vdm_jax.noise_levels import level_from_log_snr

PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
BEST = {
    prediction_type: closed_form.OptimalDenoiser(DISTRIBUTIONS["closed_form.Mixture"], prediction_type)
    for prediction_type in ("x_0", "eps", "v", "score")
}
POINTS = jnp.stack([POINT] * 2, axis=1)  # a batch of two in each row
# Public functions that `test_transforms` tests elsewhere.
MORE = {
    "closed_form.OptimalDenoiser": (
        lambda x, lam: [net(x, level_from_log_snr(lam)) for net in BEST.values()],
        (jnp.stack([POINT] * 2), jnp.stack([LOW] * 2)),
    ),
    "closed_form.OptimalDecoder": (
        lambda x, lam: closed_form.OptimalDecoder(DISTRIBUTIONS["closed_form.Mixture"])(
            x, x, level_from_log_snr(lam)
        ).log_prob(x),
        (POINT, LOW),
    ),
    "probability_flow.log_likelihood": (
        lambda k, x: probability_flow.log_likelihood(BEST["eps"], k, x, CONTINUOUS, trace="exact").log_prob,
        (KEYS, POINTS),
    ),
    "probability_flow.sample": (lambda x: probability_flow.sample(BEST["eps"], x, CONTINUOUS), (POINTS,)),
    "probability_flow.encode": (lambda x: probability_flow.encode(BEST["eps"], x, CONTINUOUS), (POINTS,)),
    "probability_flow.sample_with_log_prob": (
        lambda k, x: probability_flow.sample_with_log_prob(BEST["eps"], k, x, CONTINUOUS, trace="exact")[:2],
        (KEYS, POINTS),
    ),
    "samplers.adaptive": (lambda k, x: samplers.adaptive(BEST["eps"], k, x, CONTINUOUS).x_0, (KEYS, POINTS)),
}
CASES = {**ROWS, **{name: (function, ()) for name, function in HOST.items()}, **MORE}


def products(program: Any) -> Iterator[Any]:
    """The products in a program and in all programs within it: of jit, scan, while, cond and custom gradients."""
    program = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for equation in program.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation
        for part in jax.tree.leaves(equation.params, is_leaf=lambda part: isinstance(part, (Jaxpr, ClosedJaxpr))):
            if isinstance(part, (Jaxpr, ClosedJaxpr)):
                yield from products(part)


def imprecise(function: Any, *args: Any, gradient: bool = True) -> list[str]:
    """The products below the highest precision in a function mapped over rows or, where it has one, in its gradient."""
    real = [i for i, arg in enumerate(args) if jnp.issubdtype(arg.dtype, jnp.floating)]

    def total(*args):
        leaves = map(jnp.asarray, jax.tree.leaves(function(*args)))
        return sum((leaf.sum() for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)), jnp.zeros(()))

    traced = jax.grad(total, real) if real and gradient else function  # the gradient's program contains the function's
    program = jax.make_jaxpr(jax.vmap(traced) if args else traced)(*args)
    return [str(e) for e in products(program) if e.params["precision"] != HIGHEST]


@pytest.mark.usefixtures("without_checks_of_annotations")
@pytest.mark.parametrize("which", ["functions", pytest.param("gradients", marks=pytest.mark.slow)])
def test_every_function_is_traced_and_its_products_have_the_highest_precision(which):
    for name, (function, rows) in CASES.items():
        slow = ("probability_flow.log_likelihood", "probability_flow.sample_with_log_prob")
        if name in slow and which == "functions":  # each takes as long as all others together
            continue
        try:
            found = imprecise(function, *rows, gradient=name in GUARDED or which == "gradients")
        except Exception as error:
            raise AssertionError(f"{name} cannot be traced") from error
        assert found == [], name


def _custom(rule):
    function = rule(lambda x: x)
    if rule is jax.custom_jvp:
        function.defjvp(lambda primals, tangents: (primals[0], tangents[0] @ primals[0]))
    else:
        function.defvjp(lambda x: (x, x), lambda x, slope: (slope @ x,))
    return function


HIDDEN = {
    "plain": lambda x: x @ x,
    "jit": jax.jit(lambda x: x @ x),
    "vmap": lambda x: jax.vmap(lambda row: x @ row)(x),
    "scan": lambda x: jax.lax.scan(lambda carry, _: (carry @ x, None), x, None, length=2)[0],
    "while": lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c @ c, jax.lax.stop_gradient(x)) + x,
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x, x),
    "map": lambda x: jax.lax.map(lambda row: x @ row, x),
    "checkpoint": jax.checkpoint(lambda x: x @ x),
    "custom_jvp": _custom(jax.custom_jvp),
    "custom_vjp": _custom(jax.custom_vjp),
    "convolution": lambda x: jnp.convolve(x[0], x[1]),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_product_at_default_precision_is_found_in_any_transformation(name):
    assert imprecise(HIDDEN[name], jnp.ones((1, 3, 3)))
    if not name.startswith("custom"):
        assert imprecise(HIDDEN[name], jnp.ones((1, 3, 3)), gradient=False)


def test_networks_keep_their_own_precision():
    # an equation does not change the precision of the network that it evaluates
    def network(w, x_t, level):
        del level
        return x_t @ w

    def loss(w):
        return losses.simple_loss(Partial(network, w), KEYS[0], BATCH[0], SCHEDULE)

    found = imprecise(loss, jnp.eye(3)[None])
    assert found
    assert all("precision" not in equation for equation in found)
