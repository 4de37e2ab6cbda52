"""Faults of a file, told all at once."""

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 10


def listed(kind: str, names: Sequence[str]) -> list[str]:
    """A line "kind (count): the first ten, sorted", or none where there are no names."""
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{kind} ({len(names)}): {', '.join(sorted(names)[:SHOWN])}{more}"]


def refuse(what: str, faults: Sequence[str], remedy: str) -> None:
    """Raise ValueError of what is at fault, one fault a line, and the remedy; nothing where there is no fault."""
    if faults:
        raise ValueError("\n  ".join([f"{what}:", *faults]) + f"\n{remedy}")


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
            lines.append(f"{name} is {config[name]!r}: supported is {' or '.join(map(repr, values))}")
    return lines
