"""Validation of options: types as declared, numbers within limits."""

import dataclasses
import os
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

UPPER = 2**31  # every number must be smaller
LIMITS: dict[str, tuple[int, int]] = {  # minimum and exclusive maximum; by default 0 and UPPER
    name: limits
    for names, limits in {
        "steps batch_size eval_batch_size accumulate log_every checkpoint_every keep": (1, UPPER),
        "channels multipliers groups width latent features z_channels components": (1, UPPER),
        "probes chain_steps sampling_steps importance_samples terms": (1, UPPER),
        "likelihood_report.steps importance_steps": (1, UPPER - 1),  # a discretized schedule has one more
        "sampling.steps": (0, UPPER),
        "blocks layers encoder": (0, 1_001),  # each is traced separately
        "num_steps": (0, 1_000_001),  # of a tabulated schedule
        "num_levels": (2, 1_000_001),
        "levels image_size": (0, 2**16 + 1),
        "seed": (0, 2**32),
        # their exponentials are finite in float32
        "gamma_0 gamma_1 log_snr_max log_snr_min fourier_exponents": (-80, 81),
        "guidance_scale": (-UPPER, UPPER),
    }.items()
    for name in names.split()
}
POSITIVE = frozenset("learning_rate tolerance step_size rate".split())
FRACTIONS = frozenset("b1 b2 ema_decay dropout label_dropout test_share".split())
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}
Number = int | float


def flag(field: str) -> str:
    """The command-line option of a config field."""
    return "--" + field.replace("_", "-")


def malformed(config: Any, prefix: str = "") -> list[str]:
    """A line for every option, nested ones included, whose value does not have the declared type.

    Args:
        config: a dataclass of options.
        prefix: prefix of the option names, such as "network.".
    """
    faults, hints = [], get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if not matches_type(value, hints[field.name]):
            faults.append(type_fault(name, hints[field.name]))
        elif dataclasses.is_dataclass(value):
            faults += malformed(value, f"{name}.")
    return faults


def out_of_range(config: Any) -> list[str]:
    """A line for every option, nested ones included, whose value is outside its limits.

    Args:
        config: a dataclass of options of the declared types.
    """
    faults = [_limit(name, value) for name, value in _numbers(config)]
    if not _is_folder_name(config.workdir):
        faults.append("--workdir must be a valid folder name: without NUL, and at most 255 bytes in each part")
    return [fault for fault in dict.fromkeys(faults) if fault]


def matches_type(value: Any, hint: Any) -> bool:
    """Whether a value has a declared type; bool is not a number, and an int is accepted as a float."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, UnionType):
        return any(matches_type(value, part) for part in parts)
    if origin is tuple:
        alike = isinstance(value, tuple) and parts[1:] == (Ellipsis,)
        each = parts[:1] * len(value) if alike else parts
        return isinstance(value, tuple) and len(value) == len(each) and all(map(matches_type, value, each))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_fault(name: str, hint: Any) -> str:
    """The message for an option that does not have the declared type."""
    return f"{flag(name)} must be {_type_name(hint)}"


def _type_name(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_type_name, parts))
    return TYPE_NAMES.get(origin or hint, "nothing" if hint is type(None) else "an object")


def _limit(name: str, value: Number) -> str:
    """The message for a number outside its limits, or "". NaN is outside all limits."""
    last = name.rsplit(".", 1)[-1]
    if last in FRACTIONS:
        return "" if 0 <= value < 1 else f"{flag(name)} must be in [0, 1)"
    if last in POSITIVE:
        return "" if 0 < value < UPPER else f"{flag(name)} must be positive and finite"
    shared = (0, UPPER) if last == "steps" else LIMITS.get(last, (0, UPPER))  # whose limits depend on the group
    least, beyond = LIMITS.get(name, shared)
    if not value >= least:
        return f"{flag(name)} must be at least {least}"
    return "" if value < beyond else f"{flag(name)} must be below {beyond}"


def _numbers(config: Any, prefix: str = "") -> list[tuple[str, Number]]:
    """Every number among the options, those in nested options and in lists included, with the option's name."""
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


def _is_folder_name(path: str) -> bool:
    try:
        return "\0" not in path and all(len(os.fsencode(part)) < 256 for part in Path(path).parts)
    except UnicodeEncodeError:  # an unpaired surrogate
        return False
