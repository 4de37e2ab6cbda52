"""The training loop: resume, update, log, save, write samples, stop."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grain
import jax
import numpy as np

from vdm_jax.training import config as options
from vdm_jax.training import optimizer
from vdm_jax.training.checkpoint import Checkpoints, Saved
from vdm_jax.training.data import batches as batching
from vdm_jax.training.data.augmentation import augmentations
from vdm_jax.training.experiment import Params
from vdm_jax.training.integrity import NonFiniteState
from vdm_jax.training.run import Run, abstract_state, files_changed, initial_state, state_sharding, write_config
from vdm_jax.training.runtime.devices import batch_sharding, local_rows, make_global, on_one_device
from vdm_jax.training.runtime.errors import Stopped, UserError
from vdm_jax.training.runtime.files import run_lock
from vdm_jax.training.runtime.metric_buffer import MetricBuffer, NonFinite
from vdm_jax.training.runtime.metrics_writer import MetricsWriter, print_line
from vdm_jax.training.runtime.processes import DelayedMax
from vdm_jax.training.runtime.signals import stop_requests
from vdm_jax.training.runtime.speed import Speed
from vdm_jax.training.state import TrainState, count
from vdm_jax.training.step import Step, make_step

T = TypeVar("T")
WriteSamples = Callable[[Params, Path], None]
RESUME = "The same command resumes from there."


class Start(NamedTuple):
    """Where a run starts or resumes: its state, the iterator at its position in the data, its training time so far."""

    state: TrainState
    batches: grain.DatasetIterator
    seconds: float


def train(
    run: Run, changed: bool = False, step: Step | None = None, write_samples: WriteSamples | None = None
) -> Saved:
    """Train a run to its last step, resuming from its newest readable checkpoint.

    Args:
        run: the run.
        changed: resume although options have changed.
        step: the run's `compiled_step`, if it has been traced already.
        write_samples: called with the averaged parameters on one device and a path, every `picture_every` steps, to
            write a sample grid; None writes none.

    Returns:
        the final state with its notes, as saved.

    Raises:
        UserError: non-finite numbers, changed options, unreadable checkpoints, another run in the folder.
        Stopped: SIGINT or SIGTERM arrived; the state is saved.
    """
    last, folder = run.config.steps, run.folder
    with stop_requests() as stop, run_lock(folder), Checkpoints(folder / "checkpoints", run.config.keep) as checkpoints:
        start = start_or_resume(run, checkpoints, changed)
        first = int(start.state.step)
        with MetricsWriter(folder, first, last) as writer:
            loop, latest_signal = Loop(run, start, checkpoints, writer, step, write_samples), DelayedMax(run.mesh)
            for number in range(first + 1, last + 1):
                loop.advance(number)
                loop.between_steps(number)
                signum = latest_signal(stop.signum)
                if signum and number < last:
                    loop.save(number)
                    checkpoints.wait()
                    raise Stopped(f"Stopped and saved at step {number}. {RESUME}", signum)
            loop.save(last)
        checkpoints.wait()
        return Saved(loop.state, loop.notes(), [])


def compiled_step(run: Run) -> Step:
    """The update of a run; traced and compiled at its first call."""
    config, adam = run.config, optimizer.optimizer(run.config)
    options = {"seed": config.seed, "ema_decay": config.ema_decay, "accumulate": config.accumulate}
    return make_step(run.experiment, adam, run.mesh, place=state_sharding(run), **options)


def start_or_resume(run: Run, checkpoints: Checkpoints, changed: bool = False) -> Start:
    """Resume from the newest readable checkpoint, or start at step 0 if there are no checkpoints.

    Raises:
        UserError: the checkpoint has other options or is beyond the last step, or no checkpoint is readable.
    """
    config, stored = run.config, options.to_json(run.config)
    batches = new_batches(run)
    check_changes(run, checkpoints.notes(), stored, changed)
    saved = checkpoints.restore(abstract_state(run))
    if saved is not None:
        batches.set_state(saved.notes["data"])
        checkpoints.set_aside(saved.unreadable)
        for step in saved.unreadable:
            print(f"The checkpoint of step {step} cannot be read; moved to {run.folder / 'unreadable'}.", flush=True)
        print(f"Resuming from step {int(saved.state.step)} of {config.steps}.", flush=True)
    write_config(run)
    if saved is not None:
        return Start(saved.state, batches, saved.notes["seconds"])
    return Start(initial_state(run), batches, 0.0)


def check_changes(run: Run, notes: dict[str, Any] | None, stored: dict[str, Any], changed: bool) -> None:
    """Compare the options, and a user's own data files, with those of the newest checkpoint.

    Args:
        run: the run to resume.
        notes: the notes of its newest checkpoint.
        stored: the present options as JSON.
        changed: print the changes instead of raising an error.

    Raises:
        UserError: options or files have changed and `changed` is false, or the checkpoint is beyond the last step.
    """
    if notes is None:
        return
    lines, beyond = options.differences(notes["config"], stored), notes["step"] > run.config.steps
    if files_changed(run, notes):
        lines += [f"--data {run.config.data}: its files have changed; restore them to resume"]
    if beyond:
        lines += [f"--steps: {run.config.steps} requested, but the run has already reached step {notes['step']}"]
    else:
        lines += learning_rate_jump(run, notes)
    if not lines:
        return
    what = f"The options differ from those of the run in {run.folder} (saved -> now):\n  " + "\n  ".join(lines)
    if changed and not beyond:
        print(what, flush=True)
        return
    raise UserError(
        f"{what}\nUse the old options to resume, --changed to resume with the new ones, another --workdir, or --fresh "
        "to start over, which deletes that run."
    )


def learning_rate_jump(run: Run, notes: dict[str, Any]) -> list[str]:
    """A line if a new number of --steps makes the learning rate jump: a cosine schedule depends on the last step.

    Args:
        run: the run to resume.
        notes: the notes of its newest checkpoint.
    """
    step, old = notes["step"], notes["config"]
    if old["steps"] == run.config.steps or not old["lr_schedule"] == run.config.lr_schedule == "cosine":
        return []

    def rate(config: options.TrainConfig, update: int) -> float:
        return np.asarray(optimizer.learning_rate(config)(update)).item()

    before = dataclasses.replace(run.config, **{name: old[name] for name in ("steps", "learning_rate", "warmup_steps")})
    if rate(before, step) == rate(run.config, step):
        return []
    rates = f"from {rate(before, max(step - 1, 0)):.2g} to {rate(run.config, step):.2g}"
    return [f"--steps: {old['steps']} -> {run.config.steps}: with --lr-schedule cosine the learning rate jumps {rates}"]


def new_batches(run: Run) -> grain.DatasetIterator:
    """A new iterator over this process's rows of the run's training batches."""
    config = run.config
    augment = augmentations(flip=config.flip, rotation=config.rotate, channels=config.swap_channels)
    rows = local_rows(run.mesh, config.batch_size)
    return batching.train_iterator(run.data.train, config.batch_size, config.seed, augment, rows)


class Loop:
    """The changing parts of a run in training."""

    def __init__(
        self,
        run: Run,
        start: Start,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        step: Step | None = None,
        write_samples: WriteSamples | None = None,
    ):
        self.run, self.checkpoints, self.writer, self.write_samples = run, checkpoints, writer, write_samples
        self.state, self.batches = start.state, start.batches
        self.first = self.saved_step = int(start.state.step)
        self.metrics = MetricBuffer()
        self.step = step or compiled_step(run)
        self.pipeline = batching.images_per_second(lambda: new_batches(run), run.config.batch_size, seconds=0.3)
        print_line(run_description(run, count(start.state.params), self.pipeline))
        self.speed = Speed(self.first, start.seconds)

    def advance(self, step: int) -> None:
        """Dispatch one update; it may still be running on the devices when this returns."""
        batch = make_global(next(self.batches), batch_sharding(self.run.mesh))
        self.state, metrics = self.step(self.state, batch)
        self.metrics.add(step, metrics)
        self.writer.advance()

    def between_steps(self, step: int) -> None:
        """Log, save and write samples at the steps for which they are due.

        Raises:
            UserError: a loss or gradient is not finite.
        """
        config = self.run.config
        if step == self.first + 1:
            self.fetch(self.metrics.fetch)
            self.speed.compiled(step)
        if step % config.log_every == 0 or step == config.steps:
            self.log(step)
        if step % config.checkpoint_every == 0:
            self.save(step)
        if self.write_samples and config.picture_every and config.num_samples and step % config.picture_every == 0:
            with self.speed.pause():
                self.write_samples(on_one_device(self.state.ema), self.run.folder / f"samples/step_{step:06}.png")

    def log(self, step: int) -> None:
        """Write the metrics, averaged over the steps since the last log line."""
        metrics = self.fetch(self.metrics.means)
        rate = self.speed.lap(step)
        speeds = {"steps_per_second": rate, "images_per_second": rate * self.run.config.batch_size} if rate else {}
        self.writer.write(step, metrics | speeds)

    def save(self, step: int) -> None:
        """Save a checkpoint, unless the state contains NaN or infinity."""
        if step == self.saved_step:
            return
        self.writer.check_folder()  # Orbax would create a removed folder again
        loss = self.fetch(self.metrics.loss)
        try:
            with self.speed.pause():  # copies the state; writing continues in the background
                self.checkpoints.save(step, self.state, self.notes(), loss)
        except NonFiniteState as error:
            raise self.non_finite_error(f"The state is not finite after step {step}") from error
        self.saved_step = step

    def notes(self) -> dict[str, Any]:
        """What a checkpoint holds besides the state."""
        rate = self.speed.overall
        return {
            "step": int(self.state.step),
            "config": options.to_json(self.run.config),
            "data": self.batches.get_state(),
            "data_files": self.run.data.spec.fingerprint,
            "seconds": self.speed.seconds,
            "training_images_per_second": rate and rate * self.run.config.batch_size,
            "pipeline_images_per_second": self.pipeline,
        }

    def fetch(self, get: Callable[[], T]) -> T:
        """Fetch metrics; a number that is not finite ends the run with a message."""
        try:
            return get()
        except NonFinite as error:
            raise self.non_finite_error(str(error)) from error

    def non_finite_error(self, what: str) -> UserError:
        """The error that ends a run with numbers that are not finite."""
        good = self.checkpoints.latest
        kept = f"The last good checkpoint is {self.checkpoints.path(good)}." if good else "No checkpoint was saved yet."
        return UserError(
            f"{what}; training stopped. {kept}\nResume with --changed and a lower --learning-rate or a smaller "
            "--grad-clip, or start over with --fresh. The same options would fail again at the same step."
        )


def run_description(run: Run, params: int, pipeline: float) -> str:
    """One line on the model, the data, the devices and the throughput of the data pipeline in images per second."""
    spec = run.data.spec
    size = "x".join(map(str, spec.shape))
    device = jax.devices()[0].device_kind
    return (
        f"{run.name}: {params:,} parameters | {spec.name}, {spec.num_train:,} training and {spec.num_test:,} test "
        f"{spec.noun} of {size} | {run.mesh.size} x {device} | data pipeline alone: {pipeline:,.0f} images/s"
    )
