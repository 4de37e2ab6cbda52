"""Files that may be anything: read, or refused with what is wrong with them."""

import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> bytes:
    """What is in a file.

    Raises:
        ValueError: it is no file, or cannot be read.
    """
    if not os.path.isfile(path):  # a pipe would never end
        raise ValueError(f"{path} is no file: name another.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): copy it again, or see whose it is.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is no such file, or no object in it.
    """
    if not os.path.exists(path):  # which, unlike Path's, knows what to say of every name
        raise ValueError(f"There is no {path}, which describes the network: put it there, or name it (config).")
    data = read(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): copy it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: copy it again.")
    return value
