"""Checks of config files. All faults are reported at once; values are shortened and made printable."""

from collections.abc import Callable, Mapping, Sequence
from reprlib import Repr
from typing import Any

__all__ = [
    "invalid_fields",
    "is_int",
    "is_list_of",
    "is_null_or",
    "is_number",
    "printable",
    "raise_if_any",
    "shorten",
    "summarize",
    "unsupported_fields",
    "with_defaults",
]

SHOWN = 10
_SHORT = Repr()
_SHORT.maxlist, _SHORT.maxlevel, _SHORT.maxstring = 20, 3, 60

Check = Callable[[Any], bool]


def summarize(fault: str, names: Sequence[str]) -> list[str]:
    """A line "fault (count): first ten names, sorted"; an empty list without names."""
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{fault} ({len(names)}): {', '.join(sorted(names)[:SHOWN])}{more}"]


def raise_if_any(faults: Sequence[str], what: str, remedy: str) -> None:
    """Raise a ValueError that lists the faults, one a line, between a heading and the remedy."""
    if faults:
        raise ValueError(printable("\n  ".join([f"{what}:", *faults]) + f"\n{remedy}"))


def printable(text: str) -> str:
    """Escape characters that are not printable, such as terminal control sequences."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shorten(value: Any) -> str:
    """The repr of a value, shortened."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer with thousands of digits
        return type(value).__name__


def invalid_fields(config: Mapping[str, Any], checks: Mapping[str, tuple[Check, str]]) -> list[str]:
    """A line for every field that fails its check.

    Args:
        config: the fields.
        checks: by field name, the check of its value, and a description of valid values.
    """
    wrong = {name: valid for name, (check, valid) in checks.items() if not check(config[name])}
    return [f"{name} is {shorten(config[name])}: supported is {valid}" for name, valid in wrong.items()]


def unsupported_fields(config: Mapping[str, Any], supported: Mapping[str, Sequence[Any]]) -> list[str]:
    """A line for every field whose value is not one of those supported."""
    wrong = {name: values for name, values in supported.items() if config[name] not in values}
    return [
        f"{name} is {shorten(config[name])}: supported is {' or '.join(map(repr, values))}"
        for name, values in wrong.items()
    ]


def is_int(least: int, most: int) -> Check:
    """A check for integers in [least, most]."""
    return lambda value: type(value) is int and least <= value <= most


def is_number(least: int | float, most: int | float) -> Check:
    """A check for integers and floats in [least, most]."""
    return lambda value: type(value) in (int, float) and least <= value <= most


def is_null_or(check: Check) -> Check:
    """A check for null, or values that pass another check."""
    return lambda value: value is None or check(value)


def is_list_of(check: Check, most: int) -> Check:
    """A check for lists of 1 to `most` entries that pass another check."""
    return lambda value: isinstance(value, (list, tuple)) and 0 < len(value) <= most and all(map(check, value))


def with_defaults(file: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, and defaults for missing ones. Private fields ("_...") are dropped.

    Raises:
        ValueError: fields without a default, since their meaning is unknown.
    """
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(public.keys() - defaults.keys())
    raise_if_any(summarize("unknown fields", unknown), file, "Remove them if they do not change the model.")
    return {**defaults, **public}
