"""Checkpoints: the state, the data's position, the options; saved in the background, whole or not at all."""

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

from vdm_jax.training.integrity import BadNumbers, Damaged, decodes, look, sealed, unsealed
from vdm_jax.training.runtime.errors import UserError, disk_is_full
from vdm_jax.training.runtime.processes import by_first, everyone, is_first, meet
from vdm_jax.training.state import TrainState

METADATA = "_CHECKPOINT_METADATA"  # Orbax's


class Saved(NamedTuple):
    """What a checkpoint holds.

    state: the train state.
    notes: JSON values: {"step", "config", "data": iterator state, "seconds": training time so far, and speeds}.
    unreadable: newer steps that were passed over because they could not be read, or are not what was saved.
    """

    state: TrainState
    notes: dict[str, Any]
    unreadable: list[int]


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and the one with the lowest loss.

    Args:
        folder: where they are; made if absent.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int = 1):
        self.folder = folder.absolute()
        steps = {int(path.name): path for path in self.folder.glob("[0-9]*") if re.fullmatch("[0-9]+", path.name)}
        damaged = [step for step, path in steps.items() if _lost_its_loss(path)]
        newest = max(steps.keys() - set(damaged), default=-1)
        self._half_deleted = [step for step in damaged if step < newest and not _has_its_files(steps[step])]
        self._without_loss = [step for step in damaged if step not in self._half_deleted]
        meet()  # all have looked before the first one acts
        self._move_aside(damaged)  # Orbax would not even open the folder
        lowest_loss = policies.BestN(get_metric_fn=_loss, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=_loss,  # without it the losses are not written down, and forgotten on resume
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), lowest_loss]),
            cleanup_tmp_directories=True,  # what a killed run left half written
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "notes"))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and jax.process_count() > 1:  # to end a save together, all would have to be there
            return
        try:
            self._manager.close()
        except Exception:
            if error is None:  # otherwise the first error is the one to show
                raise

    @property
    def latest(self) -> int | None:
        """The newest step saved, or None."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, state: TrainState, notes: dict[str, Any], loss: float) -> None:
        """Save in the background, with a checksum; errors of the save before surface here.

        Raises:
            BadNumbers: a number of the state is not finite; nothing is saved.
            OSError: the disk is full (see `errors.disk_is_full`).
        """
        seen = look(state)
        if not seen.finite:
            raise BadNumbers
        notes = sealed({**notes, "checksum": seen.checksum})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
        self._manager.save(step, args=items, metrics={"loss": loss}, force=True)

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def notes(self) -> dict[str, Any] | None:
        """The notes of the newest checkpoint that has any to read, or None."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                items = ocp.args.Composite(notes=ocp.args.JsonRestore())
                return unsealed(self._manager.restore(step, args=items)["notes"])
            except Exception:  # `restore` will say what is wrong with it
                continue
        return None

    def restore(self, like: TrainState) -> Saved | None:
        """The newest checkpoint that can be read, or None where there is none at all.

        Args:
            like: a state of the same structure (arrays or ShapeDtypeStructs with shardings).

        Raises:
            UserError: there are checkpoints, but none can be read.
        """
        unreadable: dict[int, str] = {}
        aside = self._without_loss
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                with _no_aftermath():
                    return Saved(*self._read(step, like), unreadable=aside + list(unreadable))
            except Exception as error:  # Orbax, tensorstore and JSON each have their own
                if disk_is_full(error):
                    raise
                unreadable[step] = str(error)
        if not unreadable and not aside:
            return None
        reason = next(iter(unreadable.values()), "damaged").strip().splitlines() or ["unknown reason"]
        raise UserError(
            f"No checkpoint in {self.folder} can be read (step {max(unreadable or aside)}: {reason[0][:300]}). If the "
            "experiment's code changed since, check out the code that made them; otherwise start anew with --fresh."
        )

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore())
        if jax.process_count() > 1 and not everyone(not is_first() or decodes(self.path(step) / "state")):
            raise Damaged("some of its arrays cannot be read")
        saved = self._manager.restore(step, args=items)
        state, notes = TrainState(*saved["state"]), unsealed(saved["notes"])
        if int(state.step) != step:  # a copy, which would hide every later one
            raise Damaged(f"it is that of step {int(state.step)}")
        if look(state).checksum != notes.pop("checksum"):
            raise Damaged("its arrays are not those that were written")
        return state, notes

    def set_aside(self, steps: list[int]) -> None:
        """Move unreadable checkpoints out of the way, into `unreadable` beside the folder; nothing is deleted."""
        self._move_aside(steps)
        self._manager.reload()

    def _move_aside(self, steps: list[int]) -> None:
        if steps:
            by_first(lambda: self._rename(steps))

    def _rename(self, steps: list[int]) -> None:
        for step in steps:
            if step in self._half_deleted:  # an old one, when the run was killed
                shutil.rmtree(self.path(step), ignore_errors=True)
                continue
            target = self.folder.parent / "unreadable" / str(step)
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "_")
            if self.path(step).exists():
                self.path(step).rename(target)


@contextlib.contextmanager
def _no_aftermath() -> Iterator[None]:
    """Keep quiet about the half-done reads that Orbax drops when one of many fails; the error itself passes."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        time.sleep(0.5)  # reads still under way come back to a loop that is closed
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
