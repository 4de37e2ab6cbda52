"""Metrics are on disk after every line, written by the calling thread, and files are closed on errors."""

import errno
import gc
import json
import struct
import threading

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vdm_jax.training.runtime.metrics_writer import MetricsWriter

LINE = {"loss": 1.5, "grad_norm": 0.25}


def events(folder):
    """The events of each file of a run, oldest first: records of a length, its checksum, the bytes, their checksum."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        assert ".tfevents." in path.name  # the pattern that TensorBoard looks for
        data = path.read_bytes()
        found.append([])
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found[-1].append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(file):
    return [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in file]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_line_is_in_both_files_once_it_is_written(folder):
    def threads():
        return {thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"}

    before = threads()
    with MetricsWriter(folder, 0, 10) as writer:
        for step in (1, 2):
            writer.write(step, LINE)
            assert threads() == before
            (file,) = events(folder)
            assert file[0].file_version == "brain.Event:2"
            assert scalars(file[1:]) == [(i, LINE) for i in range(1, step + 1)]
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == [{"step": i, **LINE} for i in range(1, step + 1)]


def test_a_resumed_run_removes_the_lines_that_it_repeats(folder):
    for start in (0, 2):
        with MetricsWriter(folder, start, 10) as writer:
            for step in range(start + 1, 5):
                writer.write(step, LINE)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    old, new = events(folder)
    assert not any(event.HasField("session_log") for event in old)
    (begins,) = (event for event in new if event.HasField("session_log"))
    # TensorBoard then drops earlier events of this and later steps
    assert (begins.step, begins.session_log.status) == (3, SessionLog.START)
    assert [step for step, values in scalars(new) if values] == [3, 4]


def test_a_metric_that_is_not_finite_is_null(folder):
    with MetricsWriter(folder, 0, 10) as writer:
        writer.write(1, LINE | {"kl": float("nan"), "nats": float("-inf")})
    read = json.loads((folder / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert read == {"step": 1, **LINE, "kl": None, "nats": None}


@pytest.mark.parametrize("which", ["metrics.jsonl", "events"])
def test_a_full_disk_is_one_error_and_everything_is_closed(folder, monkeypatch, which):
    writer = MetricsWriter(folder, 0, 10)
    files = {"metrics.jsonl": writer._file, "events": writer._events._records._writer}
    full = open("/dev/full", "w" if which == "metrics.jsonl" else "wb")  # noqa: SIM115
    monkeypatch.setattr(writer, "check_folder", lambda: None)
    if which == "metrics.jsonl":
        writer._file = full
    else:
        writer._events._records._writer = full
    with pytest.raises(OSError, match="No space left on device") as error, writer:
        writer.write(1, LINE)
    assert error.value.errno == errno.ENOSPC
    assert full.closed
    files[which].close()  # which was replaced
    assert all(file.closed for file in files.values())
    gc.collect()  # closing a file during garbage collection could raise here
