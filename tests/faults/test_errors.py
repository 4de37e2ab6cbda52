"""Errors of the file system are printed once, and a closed output is not an error."""

import errno
import os
import shutil
import sys
import threading

import pytest

from vdm_jax.training.runtime.errors import not_writable, readable_errors, tolerate_closed_output
from vdm_jax.training.runtime.files import process_lock
from vdm_jax.training.runtime.metrics_writer import MetricsWriter


def behind(error):
    """An error with another one as its cause."""
    hiding = RuntimeError("saving failed")
    hiding.__cause__ = error
    return hiding


def test_missing_write_permission_is_recognized_among_causes():
    for code in (errno.EROFS, errno.EACCES, errno.EPERM):
        assert "/runs/x" in str(not_writable(behind(OSError(code, os.strerror(code), "/runs/x"))))
    assert not_writable(ValueError("PERMISSION_DENIED: open: Permission denied [path='/runs/x']"))
    assert not_writable(OSError(errno.ENOENT, "gone")) is None
    assert not_writable(ValueError("no such option")) is None


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied", "/runs/x"), OSError(28, "full")])
def test_an_error_is_printed_once_though_threads_meet_it_too(capsys, monkeypatch, error):
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

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored after the test
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as end, readable_errors():
        fail_everywhere()
    Left()
    assert end.value.code == 1
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1
    assert "--workdir" in text


def test_a_removed_folder_is_printed_once_though_writes_are_pending(capsys, monkeypatch, tmp_path):
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook"), (sys, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after the test

    def run():
        with readable_errors(), process_lock(tmp_path / "run"), MetricsWriter(tmp_path / "run", 0, 1) as writer:
            shutil.rmtree(tmp_path / "run")
            writer.check_folder()

    with pytest.raises(SystemExit):
        run()
    late = RuntimeError("Event loop is closed")  # raised in a thread of tensorstore after the message
    sys.excepthook(RuntimeError, late, None)
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1
    assert "was removed during the run" in text


def test_a_closed_pipe_ends_nothing(monkeypatch):
    reads, writes = os.pipe()
    with os.fdopen(writes, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        os.close(reads)
        with tolerate_closed_output():
            for _ in range(10_000):  # more than the capacity of a pipe
                print("a line")
            sys.stdout.flush()
        assert sys.stdout is stream
        print("and another")
