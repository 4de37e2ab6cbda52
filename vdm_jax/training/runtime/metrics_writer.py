"""What a run tells while it goes: metrics.jsonl, TensorBoard, and the terminal."""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vdm_jax.training.runtime.files import is_there, json_text, writing
from vdm_jax.training.runtime.processes import is_first


class Journal:
    """Metrics of one run, to its folder and to the terminal, by the first of its processes.

    Args:
        folder: of the run.
        start: the step the run goes on from; what the files hold beyond it is cut off, so that no step is there twice.
        steps: the last step.
    """

    def __init__(self, folder: Path, start: int, steps: int):
        path = folder / "metrics.jsonl" if is_first() else Path(os.devnull)
        kept = _lines_until(path, start)
        with writing(path) as unfinished:
            unfinished.write_text("".join(kept))
        self._file = path.open("a")
        self._events = _Events(folder / "tensorboard", start) if is_first() else None
        self._steps = steps
        terminal = sys.stderr.isatty() and is_first()
        self._bar = tqdm(total=steps, initial=start, disable=not terminal, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as closing:  # the others too, where one fails
            for each in (self._file, self._events, self._bar):
                if each is not None:
                    closing.callback(each.close)

    def check(self) -> None:
        """See that the run's folder is still there.

        Raises:
            FileNotFoundError: it is not.
        """
        if not is_there(self._file):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._file.name)

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write down the metrics of a step."""
        self.check()
        self._file.write(json_text({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.scalars(step, values)
        if self._bar.disable:
            say(self._line(step, values))
        else:
            self._bar.set_postfix(loss=f"{values['loss']:.4g}")

    def _line(self, step: int, values: dict[str, float]) -> str:
        line = f"step {step}/{self._steps}  loss {values['loss']:.4g}  grad norm {values['grad_norm']:.3g}"
        if rate := values.get("steps_per_second"):
            line += f"  {rate:.3g} steps/s  {values['images_per_second']:,.0f} images/s"
            line += f"  {clock((self._steps - step) / rate)} left"
        return line


class _Events:
    """An events file of TensorBoard, written in the caller's thread: errors of the thread that tensorboardX's
    SummaryWriter writes in cannot be caught.

    Args:
        folder: of the run's events files.
        start: the step the run goes on from; TensorBoard forgets what earlier files hold beyond it.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        event: Any = event_pb2  # classes that are made at run time
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


def say(text: str) -> None:
    """A line to the terminal, once for all processes, that does not break a progress bar."""
    if is_first():
        tqdm.write(text, file=sys.stderr)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _lines_until(path: Path, last: int) -> list[str]:
    # A killed run may leave the last line half written; one that is damaged says nothing either.
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if line.endswith("\n") and json.loads(line)["step"] <= last:
                kept.append(line)
    return kept
