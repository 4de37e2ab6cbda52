"""Metrics of a run: metrics.jsonl, TensorBoard and the terminal."""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vdm_jax.training.runtime.files import atomic_write, json_text, still_exists
from vdm_jax.training.runtime.processes import is_first_process


class MetricsWriter:
    """Writes the metrics of a run to its folder and to the terminal, from the first process only.

    Args:
        folder: the run's folder.
        start: the step from which the run resumes; later entries of existing files are removed.
        steps: the last step.
    """

    def __init__(self, folder: Path, start: int, steps: int):
        path = folder / "metrics.jsonl" if is_first_process() else Path(os.devnull)
        kept = _lines_until(path, start)
        with atomic_write(path) as unfinished:
            unfinished.write_text("".join(kept))
        self._file = path.open("a")
        self._events = _EventsFile(folder / "tensorboard", start) if is_first_process() else None
        self._steps = steps
        terminal = sys.stderr.isatty() and is_first_process()
        self._bar = tqdm(total=steps, initial=start, disable=not terminal, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as closing:  # closes the others even if one fails
            for each in (self._file, self._events, self._bar):
                if each is not None:
                    closing.callback(each.close)

    def check_folder(self) -> None:
        """Check that the run's folder still exists.

        Raises:
            FileNotFoundError: the folder was removed.
        """
        if not still_exists(self._file):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._file.name)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of a step."""
        self.check_folder()
        self._file.write(json_text({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.scalars(step, values)
        if self._bar.disable:
            print_line(self._line(step, values))
        else:
            self._bar.set_postfix(loss=f"{values['loss']:.4g}")

    def _line(self, step: int, values: dict[str, float]) -> str:
        line = f"step {step}/{self._steps}  loss {values['loss']:.4g}  grad norm {values['grad_norm']:.3g}"
        if rate := values.get("steps_per_second"):
            line += f"  {rate:.3g} steps/s  {values['images_per_second']:,.0f} images/s"
            line += f"  {format_duration((self._steps - step) / rate)} left"
        return line


class _EventsFile:
    """A TensorBoard events file, written in the calling thread.

    tensorboardX's SummaryWriter writes in a thread of its own, whose errors cannot be caught.

    Args:
        folder: the folder of the run's events files.
        start: the step from which the run resumes; TensorBoard discards later entries of earlier files.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        event: Any = event_pb2  # its classes are created at run time
        summary: Any = summary_pb2
        self._event, self._summary = event.Event, summary.Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010}.{os.uname().nodename}.{start}"
        self._records = RecordWriter(str(folder / name))
        self._write(file_version="brain.Event:2")
        if start:
            self._write(step=start + 1, session_log=event.SessionLog(status=event.SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step."""
        value = [self._summary.Value(tag=name, simple_value=number) for name, number in values.items()]
        self._write(step=step, summary=self._summary(value=value))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, **what: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **what).SerializeToString())


def print_line(text: str) -> None:
    """Print a line on stderr without breaking a progress bar; only the first process prints."""
    if is_first_process():
        tqdm.write(text, file=sys.stderr)


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _lines_until(path: Path, last: int) -> list[str]:
    # A killed run may leave an incomplete last line; damaged lines are dropped.
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if line.endswith("\n") and json.loads(line)["step"] <= last:
                kept.append(line)
    return kept
