"""The training loop: resume, step, log, save, draw, stop."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import grain
import jax
import numpy as np

from vdm_jax.training import config as options
from vdm_jax.training import optimizer
from vdm_jax.training.checkpoint import Checkpoints, Saved
from vdm_jax.training.data import sources
from vdm_jax.training.data.augmentation import augmentations
from vdm_jax.training.evaluation.sampling import Sampler
from vdm_jax.training.integrity import BadNumbers
from vdm_jax.training.run import Run, abstract_state, first_state, placement
from vdm_jax.training.runtime.devices import on_one_device, own_rows, put, split
from vdm_jax.training.runtime.errors import Stopped, UserError
from vdm_jax.training.runtime.files import alone_in, write_json
from vdm_jax.training.runtime.metric_buffer import NonFinite, Recent
from vdm_jax.training.runtime.metrics_writer import Journal, say
from vdm_jax.training.runtime.processes import Agreement
from vdm_jax.training.runtime.signals import stop_requests
from vdm_jax.training.runtime.speed import Speed
from vdm_jax.training.state import TrainState, count
from vdm_jax.training.step import Step, make_step

T = TypeVar("T")
GO_ON = "The same command goes on from there."


class Start(NamedTuple):
    """Where a run begins or goes on: its state, its data at the right place, its training time so far."""

    state: TrainState
    batches: grain.DatasetIterator
    seconds: float


def train(run: Run, changed: bool = False, step: Step | None = None) -> Saved:
    """Train a run to its last step, going on from its newest readable checkpoint.

    Args:
        run: the run.
        changed: go on also where options have changed since.
        step: its `compiled_step`, where that has been traced already.

    Returns:
        the final state with its notes, as saved.

    Raises:
        UserError: non-finite numbers, changed options, unreadable checkpoints, another run in the folder.
        Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    last, folder = run.config.steps, run.folder
    with stop_requests() as stop, alone_in(folder), Checkpoints(folder / "checkpoints", run.config.keep) as checkpoints:
        start = begin(run, checkpoints, changed)
        first = int(start.state.step)
        with Journal(folder, first, last) as journal:
            loop, agree = Loop(run, start, checkpoints, journal, step), Agreement(run.mesh)
            for number in range(first + 1, last + 1):
                loop.advance(number)
                loop.between_steps(number)
                signum = agree(stop.signum)
                if signum and number < last:
                    loop.save(number)
                    checkpoints.wait()
                    raise Stopped(f"Stopped and saved at step {number}. {GO_ON}", signum)
            loop.save(last)
        checkpoints.wait()
        return Saved(loop.state, loop.notes(), [])


def compiled_step(run: Run) -> Step:
    """The update of a run; traced and compiled when it is called first."""
    config, adam = run.config, optimizer.optimizer(run.config)
    options = {"seed": config.seed, "ema_decay": config.ema_decay, "accumulate": config.accumulate}
    return make_step(run.experiment, adam, run.mesh, place=placement(run), **options)


def begin(run: Run, checkpoints: Checkpoints, changed: bool = False) -> Start:
    """Go on from the newest readable checkpoint, or start at step 0 where there is none.

    Raises:
        UserError: the checkpoint was made with other options, is beyond the last step, or none can be read.
    """
    config, stored = run.config, options.to_json(run.config)
    batches = new_batches(run)
    refuse_changes(run, checkpoints.notes(), stored, changed)
    saved = checkpoints.restore(abstract_state(run))
    if saved is not None:
        batches.set_state(saved.notes["data"])
        checkpoints.set_aside(saved.unreadable)
        for step in saved.unreadable:
            print(f"The checkpoint of step {step} cannot be read; moved to {run.folder / 'unreadable'}.", flush=True)
        print(f"Going on from step {int(saved.state.step)} of {config.steps}.", flush=True)
    write_json(run.folder / "config.json", {"experiment": run.name, "config": stored})
    if saved is not None:
        return Start(saved.state, batches, saved.notes["seconds"])
    return Start(first_state(run), batches, 0.0)


def refuse_changes(run: Run, notes: dict[str, Any] | None, stored: dict[str, Any], changed: bool) -> None:
    """Raise UserError where the newest checkpoint was made with other options, or has more steps than asked for.

    Where going on with other options was asked for (`changed`), say which, unless it has more steps.
    """
    if notes is None:
        return
    lines, beyond = options.differences(notes["config"], stored), notes["step"] > run.config.steps
    lines += [f"--steps: {notes['step']} made -> {run.config.steps} asked for"] if beyond else jump(run, notes)
    if not lines:
        return
    what = f"The run in {run.folder} was made with other options (then -> now):\n  " + "\n  ".join(lines)
    if changed and not beyond:
        print(what, flush=True)
        return
    raise UserError(
        f"{what}\nRepeat the old ones to go on, take another --workdir, go on with the new ones by --changed, or start "
        "anew with --fresh, which deletes that run."
    )


def jump(run: Run, notes: dict[str, Any]) -> list[str]:
    """A line where another number of --steps makes the learning rate jump: a cosine schedule ends at the last of them.

    Args:
        run: the run as it goes on.
        notes: of the checkpoint that it goes on from.
    """
    step, was = notes["step"], notes["config"]
    if was["steps"] == run.config.steps or not was["lr_schedule"] == run.config.lr_schedule == "cosine":
        return []

    def rate(config: options.TrainConfig, update: int) -> float:
        return np.asarray(optimizer.learning_rate(config)(update)).item()

    before = {name: was[name] for name in ("steps", "learning_rate", "warmup_steps")}
    old = dataclasses.replace(run.config, **before)
    if rate(old, step) == rate(run.config, step):
        return []
    rates = f"from {rate(old, max(step - 1, 0)):.2g} to {rate(run.config, step):.2g}"
    return [
        f"--steps: {was['steps']} -> {run.config.steps}: under --lr-schedule cosine the learning rate jumps {rates}"
    ]


def new_batches(run: Run) -> grain.DatasetIterator:
    """A fresh iterator over this process's rows of the run's training batches."""
    size, augment = run.config.batch_size, augmentations(run.config)
    return sources.train_iterator(run.data.train, size, run.config.seed, augment, own_rows(run.mesh, size))


class Loop:
    """What moves while a run trains."""

    def __init__(self, run: Run, start: Start, checkpoints: Checkpoints, journal: Journal, step: Step | None = None):
        self.run, self.checkpoints, self.journal = run, checkpoints, journal
        self.state, self.batches = start.state, start.batches
        self.first = self.saved_step = int(start.state.step)
        self.sampler = Sampler(run)
        self.recent = Recent()
        self.step = step or compiled_step(run)
        self.pipeline = sources.images_per_second(lambda: new_batches(run), run.config.batch_size, seconds=0.3)
        say(greeting(run, count(start.state.params), self.pipeline))
        self.speed = Speed(self.first, start.seconds)

    def advance(self, step: int) -> None:
        """Dispatch one update; the devices may still be at work on it when this returns."""
        batch = put(next(self.batches), split(self.run.mesh))
        self.state, metrics = self.step(self.state, batch)
        self.recent.add(step, metrics)
        self.journal.advance()

    def between_steps(self, step: int) -> None:
        """Log, save and draw where it is time to.

        Raises:
            UserError: a loss or gradient is not finite.
        """
        config = self.run.config
        if step == self.first + 1:
            self.look(self.recent.fetch)
            self.speed.compiled(step)
        if step % config.log_every == 0 or step == config.steps:
            self.log(step)
        if step % config.checkpoint_every == 0:
            self.save(step)
        if config.picture_every and config.num_samples and step % config.picture_every == 0:
            with self.speed.pause():
                self.sampler.glimpse(on_one_device(self.state.ema), self.run.folder / f"samples/step_{step:06}.png")

    def log(self, step: int) -> None:
        """Write a line of metrics, averaged over the steps since the last."""
        metrics = self.look(self.recent.line)
        rate = self.speed.lap(step)
        speeds = {"steps_per_second": rate, "images_per_second": rate * self.run.config.batch_size} if rate else {}
        self.journal.metrics(step, metrics | speeds)

    def save(self, step: int) -> None:
        """Save a checkpoint, and never one with a number in it that is not finite."""
        if step == self.saved_step:
            return
        self.journal.check()  # Orbax would make the folder again
        loss = self.look(self.recent.loss)
        try:
            with self.speed.pause():  # copies the state; writing goes on in the background
                self.checkpoints.save(step, self.state, self.notes(), loss)
        except BadNumbers as error:
            raise self.not_finite(f"The state is not finite after step {step}") from error
        self.saved_step = step

    def notes(self) -> dict[str, Any]:
        """What is saved beside the state."""
        rate = self.speed.overall
        return {
            "step": int(self.state.step),
            "config": options.to_json(self.run.config),
            "data": self.batches.get_state(),
            "seconds": self.speed.seconds,
            "training_images_per_second": rate and rate * self.run.config.batch_size,
            "pipeline_images_per_second": self.pipeline,
        }

    def look(self, at: Callable[[], T]) -> T:
        """Fetch metrics; a number that is not finite ends the run with a message."""
        try:
            return at()
        except NonFinite as error:
            raise self.not_finite(str(error)) from error

    def not_finite(self, what: str) -> UserError:
        """The message that ends a run gone wrong."""
        good = self.checkpoints.latest
        kept = f"The last good checkpoint is {self.checkpoints.path(good)}." if good else "No checkpoint was saved yet."
        return UserError(
            f"{what}; training stopped. {kept}\nGo on by --changed with a lower --learning-rate or a smaller "
            "--grad-clip, or start anew with --fresh (the run as it is would only repeat itself)."
        )


def greeting(run: Run, params: int, pipeline: float) -> str:
    """The first line of a run, of so many parameters and images a second of the pipeline."""
    spec = run.data.spec
    size = "x".join(map(str, spec.shape))
    device = jax.devices()[0].device_kind
    return (
        f"{run.name}: {params:,} parameters | {spec.name}, {spec.num_train:,} training and {spec.num_test:,} test "
        f"{spec.noun} of {size} | {run.mesh.size} x {device} | the data pipeline alone gives {pipeline:,.0f} images/s"
    )
