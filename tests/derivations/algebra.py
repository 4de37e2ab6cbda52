"""The forward process in symbols, the starting point of the derivations, and exact levels to evaluate results at."""

import sympy as sp

a_s, g_s, a_t, g_t = sp.symbols("alpha_s sigma_s alpha_t sigma_t", positive=True)
x_0, x_s, x_t, eps, score = sp.symbols("x_0 x_s x_t eps score", real=True)
# q(x_t|x_s) = N(KEEP x_s, ADDED), by FWD-3
KEEP = a_t / a_s
ADDED = g_t**2 - KEEP**2 * g_s**2

# Ho et al.'s symbols for adjacent steps: abar_{t-1} and beta_t
abar_s, beta = sp.symbols("abar_s beta", positive=True)
ABAR_T = abar_s * (1 - beta)
IN_BETAS = {a_s: sp.sqrt(abar_s), g_s: sp.sqrt(1 - abar_s), a_t: sp.sqrt(ABAR_T), g_t: sp.sqrt(1 - ABAR_T)}

R = sp.Rational
BETAS = [R(1, 10), R(1, 5), R(1, 3), R(1, 2)]
# exact levels (alpha_s, sigma_s, alpha_t, sigma_t): variance preserving, neither, and exploding
LEVELS = [(R(12, 13), R(5, 13), R(3, 5), R(4, 5)), (R(2), R(1, 3), R(3, 2), R(4)), (R(1), R(1, 10), R(1), R(7))]


def log_normal(x, mean, var):
    """log N(x; mean, var) of one dimension."""
    return -((x - mean) ** 2) / (2 * var) - sp.log(2 * sp.pi * var) / 2


def expected(f, x, mean, var):
    """E f(x) for x ~ N(mean, var), the integral over x = mean + sqrt(var) e."""
    e = sp.Symbol("e", real=True)
    weight = sp.exp(-(e**2) / 2) / sp.sqrt(2 * sp.pi)
    return sp.integrate(sp.expand(f.subs(x, mean + sp.sqrt(var) * e)) * weight, (e, -sp.oo, sp.oo))


def at_levels(expression, levels, **values):
    """A formula at exact levels, its other symbols given by name."""
    return at(expression, **dict(zip(("alpha_s", "sigma_s", "alpha_t", "sigma_t"), levels, strict=True)), **values)


def at_step(expression, t, **values):
    """A formula in abar_{t-1} and beta_t at step t of BETAS."""
    return at(expression, abar_s=sp.prod(1 - b for b in BETAS[: t - 1]), beta=BETAS[t - 1], **values)


def at(expression, **values):
    """A formula with every symbol given by name, as an exact number."""
    named = {str(symbol): symbol for symbol in expression.free_symbols}
    return expression.subs({named[name]: value for name, value in values.items() if name in named})
