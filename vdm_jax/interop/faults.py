"""Faults of a file, told all at once. What is in it may be anything, and is shown short and in printable letters."""

from collections.abc import Mapping, Sequence
from reprlib import Repr
from typing import Any

SHOWN = 10
_SHORT = Repr()
_SHORT.maxlist, _SHORT.maxlevel, _SHORT.maxstring = 20, 3, 60


def listed(kind: str, names: Sequence[str]) -> list[str]:
    """A line "kind (count): the first ten, sorted", or none where there are no names."""
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{kind} ({len(names)}): {', '.join(sorted(names)[:SHOWN])}{more}"]


def refuse(what: str, faults: Sequence[str], remedy: str) -> None:
    """Raise ValueError of what is at fault, one fault a line, and the remedy; nothing where there is no fault."""
    if faults:
        raise ValueError(printable("\n  ".join([f"{what}:", *faults]) + f"\n{remedy}"))


def printable(text: str) -> str:
    """A text with everything escaped that could steer a terminal, or that it cannot show."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value in short."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of thousands of digits
        return type(value).__name__


def misfits(given: Mapping[str, Any], fields: Mapping[str, tuple[Any, str]]) -> list[str]:
    """A line for every field that does not pass its test.

    Args:
        given: the fields.
        fields: of each name the test, value -> whether it passes, and what would.
    """
    wrong = {name: what for name, (test, what) in fields.items() if not test(given[name])}
    return [f"{name} is {shown(given[name])}: supported is {what}" for name, what in wrong.items()]


def whole(least: int, most: int) -> Any:
    """The test of a whole number within these limits."""
    return lambda value: type(value) is int and least <= value <= most


def number(least: int | float, most: int | float) -> Any:
    """The test of a number within these limits."""
    return lambda value: type(value) in (int, float) and least <= value <= most


def absent_or(test: Any) -> Any:
    """The test of a field that may be null."""
    return lambda value: value is None or test(value)


def list_of(test: Any, most: int) -> Any:
    """The test of a list of one entry or more, each of which passes a test."""
    return lambda value: isinstance(value, (list, tuple)) and 0 < len(value) <= most and all(map(test, value))


def settings(what: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config with defaults for those not given; private ones ("_...") are left out.

    Raises:
        ValueError: a field that is not known here, and so may mean anything.
    """
    public = {name: value for name, value in given.items() if not name.startswith("_")}
    unknown = sorted(public.keys() - defaults.keys())
    refuse(what, listed("fields unknown here", unknown), "Remove them if they change nothing.")
    return {**defaults, **public}


def unsupported(config: Mapping[str, Any], supported: Mapping[str, Sequence[Any]]) -> list[str]:
    """A line for every field whose value is not among those supported."""
    lines = []
    for name, values in supported.items():
        if config[name] not in values:
            lines.append(f"{name} is {shown(config[name])}: supported is {' or '.join(map(repr, values))}")
    return lines
