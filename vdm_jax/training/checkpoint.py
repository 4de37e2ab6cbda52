"""Checkpoints of the state, the position in the data and the options, saved in the background and atomically."""

import contextlib
import gc
import json
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vdm_jax.training.integrity import Corrupted, NonFiniteState, is_readable, summarize, with_digest, without_digest
from vdm_jax.training.runtime.errors import UserError, disk_is_full
from vdm_jax.training.runtime.processes import all_processes_agree, barrier, is_first_process, on_first_process
from vdm_jax.training.state import TrainState

METADATA = "_CHECKPOINT_METADATA"  # a file of Orbax


class Saved(NamedTuple):
    """The contents of a checkpoint.

    state: the training state.
    notes: JSON values: {"step", "config", "data": iterator state, "seconds": training time so far, and speeds}.
    unreadable: newer steps that were skipped because they are unreadable or corrupted.
    """

    state: TrainState
    notes: dict[str, Any]
    unreadable: list[int]


class Checkpoints:
    """The checkpoints of a run: the newest `keep` and the one with the lowest loss.

    Args:
        folder: their folder; created if necessary.
        keep: number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int = 1):
        self.folder = folder.absolute()
        steps = {int(path.name): path for path in self.folder.glob("[0-9]*") if re.fullmatch("[0-9]+", path.name)}
        damaged = [step for step, path in steps.items() if _lost_its_loss(path)]
        newest = max(steps.keys() - set(damaged), default=-1)
        self._half_deleted = [step for step in damaged if step < newest and not _has_its_files(steps[step])]
        self._without_loss = [step for step in damaged if step not in self._half_deleted]
        barrier()  # every process has read the folder before the first changes it
        self._move_aside(damaged)  # otherwise Orbax fails to open the folder
        lowest_loss = policies.BestN(get_metric_fn=_loss, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=_loss,  # without it the losses are not stored, and lost on resume
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), lowest_loss]),
            cleanup_tmp_directories=True,  # incomplete checkpoints of a killed run
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "notes"))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and jax.process_count() > 1:  # finishing a save would wait for all processes
            return
        try:
            self._manager.close()
        except Exception:
            if error is None:  # otherwise the first error is reported
                raise

    @property
    def latest(self) -> int | None:
        """The newest saved step, or None."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, state: TrainState, notes: dict[str, Any], loss: float) -> None:
        """Save in the background, with a checksum; errors of the previous save are raised here.

        Raises:
            NonFiniteState: the state contains NaN or infinity; nothing is saved.
            OSError: the disk is full (see `errors.disk_is_full`).
        """
        summary = summarize(state)
        if not summary.finite:
            raise NonFiniteState
        notes = with_digest({**notes, "checksum": summary.checksum})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
        self._manager.save(step, args=items, metrics={"loss": loss}, force=True)

    def wait(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def notes(self) -> dict[str, Any] | None:
        """The notes of the newest checkpoint whose notes are readable, or None."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                items = ocp.args.Composite(notes=ocp.args.JsonRestore())
                return without_digest(self._manager.restore(step, args=items)["notes"])
            except Exception:  # `restore` reports it
                continue
        return None

    def restore(self, like: TrainState) -> Saved | None:
        """The newest readable checkpoint, or None if there are no checkpoints.

        Args:
            like: a state of the same structure (arrays or ShapeDtypeStructs with shardings).

        Raises:
            UserError: there are checkpoints, but none is readable.
        """
        unreadable: dict[int, str] = {}
        aside = self._without_loss
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                with _silent_cleanup():
                    return Saved(*self._read(step, like), unreadable=aside + list(unreadable))
            except Exception as error:  # Orbax, tensorstore and JSON raise errors of their own
                if disk_is_full(error):
                    raise
                unreadable[step] = str(error)
        if not unreadable and not aside:
            return None
        reason = next(iter(unreadable.values()), "damaged").strip().splitlines() or ["unknown reason"]
        raise UserError(
            f"No checkpoint in {self.folder} can be read (step {max(unreadable or aside)}: {reason[0][:300]}). If the "
            "model's code has changed, use the version that wrote the checkpoints; otherwise start over with --fresh."
        )

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore())
        if jax.process_count() > 1 and not all_processes_agree(
            not is_first_process() or is_readable(self.path(step) / "state")
        ):
            raise Corrupted("some of its arrays cannot be read")
        saved = self._manager.restore(step, args=items)
        state, notes = TrainState(*saved["state"]), without_digest(saved["notes"])
        if int(state.step) != step:  # a copied folder, which would hide all later checkpoints
            raise Corrupted(f"it holds step {int(state.step)}")
        if summarize(state).checksum != notes.pop("checksum"):
            raise Corrupted("its arrays differ from those that were written")
        return state, notes

    def set_aside(self, steps: list[int]) -> None:
        """Move unreadable checkpoints to the folder `unreadable` beside this one; nothing is deleted."""
        self._move_aside(steps)
        self._manager.reload()

    def _move_aside(self, steps: list[int]) -> None:
        if steps:
            on_first_process(lambda: self._rename(steps))

    def _rename(self, steps: list[int]) -> None:
        for step in steps:
            if step in self._half_deleted:  # an old checkpoint that a killed run was deleting
                shutil.rmtree(self.path(step), ignore_errors=True)
                continue
            target = self.folder.parent / "unreadable" / str(step)
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "_")
            if self.path(step).exists():
                self.path(step).rename(target)


@contextlib.contextmanager
def _silent_cleanup() -> Iterator[None]:
    """Silence the pending reads that Orbax abandons when one fails; the error itself is raised."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        time.sleep(0.5)  # pending reads return to a closed event loop
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _has_its_files(path: Path) -> bool:
    return all((path / name).exists() for name in ("metrics/metrics", METADATA))


def _lost_its_loss(path: Path) -> bool:
    try:
        metrics, described = (json.loads((path / name).read_bytes()) for name in ("metrics/metrics", METADATA))
        return not (isinstance(metrics["loss"], (int, float)) and isinstance(described, dict))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True
