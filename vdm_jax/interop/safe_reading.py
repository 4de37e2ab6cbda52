"""Reading of untrusted files: their contents, or a ValueError that says what is wrong with them."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["read", "read_json"]


def read(path: Path) -> bytes:
    """The contents of a file.

    Raises:
        ValueError: the path is not a regular file, or cannot be read.
    """
    if not os.path.isfile(path):  # reading a pipe would never end
        raise ValueError(f"{path} is not a file: name another.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): copy it again, or check its permissions.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is missing, or does not contain a JSON object.
    """
    if not os.path.exists(path):  # Path.exists raises for some names
        raise ValueError(f"{path} does not exist: copy the network's config there, or pass its path (config).")
    data = read(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not contain a JSON object: copy it again.")
    return value
