import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vdm_jax.training.run import remove_run
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import LOCK, atomic_write, run_lock, write_json

ROOT = Path(__file__).parent.parent.parent
HOLD = """
import sys
from pathlib import Path
from vdm_jax.training.runtime.files import run_lock
with run_lock(Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as unfinished:
        unfinished.write_text("one")
        assert not path.exists()
    with pytest.raises(UnicodeEncodeError), atomic_write(path) as unfinished:
        unfinished.write_text("half of tw\ud800")
    assert path.read_text() == "one"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_numbers_that_json_cannot_hold_are_null(tmp_path):
    value = {
        "nan": float("nan"),
        "list": [1.5, -math.inf, (np.float64("inf"), {"deep": np.float64(2.0)})],
        "n": 1,
        "none": None,
    }
    write_json(tmp_path / "file.json", value)
    read = json.loads((tmp_path / "file.json").read_text(), parse_constant=pytest.fail)
    assert read == {"nan": None, "list": [1.5, None, [None, {"deep": 2.0}]], "n": 1, "none": None}


def test_a_temporary_file_of_a_killed_process_is_overwritten(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as unfinished:
        unfinished.write_text("one")
    unfinished.write_text("half of tw")
    write_json(path, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_locked_until_its_process_ends_in_any_way(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "holding\n"
    (tmp_path / "config.json").write_text("{}")
    message = rf"Another run is using {tmp_path} \(process {holder.pid} on .*another --workdir"
    with pytest.raises(UserError, match=message), run_lock(tmp_path):
        pass
    with pytest.raises(UserError, match=message):
        remove_run(tmp_path)
    assert (tmp_path / "config.json").exists()
    holder.kill()
    holder.communicate()
    with run_lock(tmp_path), pytest.raises(UserError, match="Another run"), run_lock(tmp_path):
        pass
    remove_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_without_locks_on_the_file_system_no_process_is_refused(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with run_lock(tmp_path), run_lock(tmp_path):
        pass
