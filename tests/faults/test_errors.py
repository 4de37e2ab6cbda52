"""Errors of the file system are told once, and a lost listener is no error."""

import errno
import gc
import os
import shutil
import sys
import threading

import pytest

from vdm_jax.training.runtime.errors import not_writable, readable_errors, tolerate_closed_output
from vdm_jax.training.runtime.files import process_lock
from vdm_jax.training.runtime.metrics_writer import MetricsWriter


def behind(error):
    """An error that hides another."""
    hiding = RuntimeError("saving failed")
    hiding.__cause__ = error
    return hiding


def test_what_may_not_be_written_is_recognised_behind_other_errors():
    for code in (errno.EROFS, errno.EACCES, errno.EPERM):
        assert "/runs/x" in str(not_writable(behind(OSError(code, os.strerror(code), "/runs/x"))))
    assert not_writable(ValueError("PERMISSION_DENIED: open: Permission denied [path='/runs/x']"))
    assert not_writable(OSError(errno.ENOENT, "gone")) is None
    assert not_writable(ValueError("no such option")) is None


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied", "/runs/x"), OSError(28, "full")])
def test_it_is_said_once_whoever_meets_it_too(capsys, monkeypatch, error):
    class Left:
        def __del__(self):
            raise error

    def fail():
        raise error

    def fail_everywhere():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        raise behind(error)

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # so that they are put back
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as end, readable_errors():
        fail_everywhere()
    Left()
    gc.collect()
    assert end.value.code == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "--workdir" in said


def test_a_folder_that_is_gone_is_told_once_though_writes_to_it_are_still_under_way(capsys, monkeypatch, tmp_path):
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook"), (sys, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that they are put back

    def run():
        with readable_errors(), process_lock(tmp_path / "run"), MetricsWriter(tmp_path / "run", 0, 1) as writer:
            shutil.rmtree(tmp_path / "run")
            writer.check_folder()

    with pytest.raises(SystemExit):
        run()
    late = RuntimeError("Event loop is closed")  # of tensorstore's threads, after the message
    sys.excepthook(RuntimeError, late, None)
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "was removed during the run" in said


def test_who_listens_no_more_ends_nothing(monkeypatch):
    reads, writes = os.pipe()
    with os.fdopen(writes, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        os.close(reads)
        with tolerate_closed_output():
            for _ in range(10_000):  # more than a pipe holds
                print("a line")
            sys.stdout.flush()
        assert sys.stdout is stream
        print("and another")
