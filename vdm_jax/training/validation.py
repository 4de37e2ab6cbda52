"""What values options may have: of the kind they are declared to be, and within limits."""

import dataclasses
import os
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

BEYOND = 2**31  # no number of an option is as large
LIMITS: dict[str, tuple[int, int]] = {  # least, and the first too large, where they are not 0 and BEYOND
    name: limits
    for names, limits in {
        "steps batch_size eval_batch_size accumulate log_every checkpoint_every keep": (1, BEYOND),
        "channels multipliers groups width latent features z_channels components": (1, BEYOND),
        "probes chain_steps sampling_steps importance_samples terms": (1, BEYOND),
        "ledger.steps importance_steps": (1, BEYOND - 1),  # a grid has one more
        "sampling.steps": (0, BEYOND),
        "blocks layers encoder": (0, 1_001),  # each is traced by itself
        "num_steps": (0, 1_000_001),  # a table's
        "num_levels": (2, 1_000_001),
        "seed": (0, 2**32),
        "gamma_0 gamma_1 log_snr_max log_snr_min fourier_exponents": (-80, 81),  # exp of it is a float32 still
        "guidance": (-BEYOND, BEYOND),
    }.items()
    for name in names.split()
}
POSITIVE = frozenset("learning_rate tolerance step_size rate".split())
FRACTIONS = frozenset("b1 b2 ema_decay dropout label_dropout".split())
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}
Number = int | float


def flag(field: str) -> str:
    """The command-line option of a config field."""
    return "--" + field.replace("_", "-")


def malformed(config: Any, prefix: str = "") -> list[str]:
    """A line for every option, nested ones included, whose value is of another kind than it is declared to be.

    Args:
        config: a dataclass of options.
        prefix: of their names, such as "network.".
    """
    faults, hints = [], get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if not is_a(value, hints[field.name]):
            faults.append(wrong_kind(name, hints[field.name]))
        elif dataclasses.is_dataclass(value):
            faults += malformed(value, f"{name}.")
    return faults


def out_of_range(config: Any) -> list[str]:
    """A line for every option, nested ones included, whose value no experiment can work with.

    Args:
        config: a dataclass of options, none of them malformed.
    """
    faults = [_limit(name, value) for name, value in _numbers(config)]
    if getattr(getattr(config, "network", None), "multipliers", None) == ():
        faults.append("--network.multipliers must be one number or more")
    if not _names_a_folder(config.workdir):
        faults.append("--workdir must be a folder's name: without a NUL, no part of it longer than 255 bytes")
    return [fault for fault in dict.fromkeys(faults) if fault]


def is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type; True and False are no numbers, whole numbers are numbers."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, UnionType):
        return any(is_a(value, part) for part in parts)
    if origin is tuple:
        alike = isinstance(value, tuple) and parts[1:] == (Ellipsis,)
        each = parts[:1] * len(value) if alike else parts
        return isinstance(value, tuple) and len(value) == len(each) and all(map(is_a, value, each))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def wrong_kind(name: str, hint: Any) -> str:
    """The fault of an option that is not of its declared type."""
    return f"{flag(name)} must be {_kind(hint)}"


def _kind(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, parts))
    return KINDS.get(origin or hint, "nothing" if hint is type(None) else "an object")


def _limit(name: str, value: Number) -> str:
    """The fault of a number, or nothing. NaN is within no limits."""
    last = name.rsplit(".", 1)[-1]
    if last in FRACTIONS:
        return "" if 0 <= value < 1 else f"{flag(name)} must be in [0, 1)"
    if last in POSITIVE:
        return "" if 0 < value < BEYOND else f"{flag(name)} must be positive and finite"
    shared = (0, BEYOND) if last == "steps" else LIMITS.get(last, (0, BEYOND))  # there are many kinds of steps
    least, beyond = LIMITS.get(name, shared)
    if not value >= least:
        return f"{flag(name)} must be at least {least}"
    return "" if value < beyond else f"{flag(name)} must be below {beyond}"


def _numbers(config: Any, prefix: str = "") -> list[tuple[str, Number]]:
    """Every number among the options, nested ones and those of lists included, and the option's name."""
    found = []
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        found += _numbers(value, f"{name}.") if nested else [(name, number) for number in _flat(value)]
    return found


def _flat(value: Any) -> list[Number]:
    if isinstance(value, tuple):
        return [number for part in value for number in _flat(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def _names_a_folder(path: str) -> bool:
    try:
        return "\0" not in path and all(len(os.fsencode(part)) < 256 for part in Path(path).parts)
    except UnicodeEncodeError:  # half of a pair
        return False
