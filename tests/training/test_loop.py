import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest

from tests.training.bits import assert_same_bits
from tests.training.experiments.tiny import CONFIG
from vdm_jax.training import checkpoint, optimizer
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.config import to_json
from vdm_jax.training.data import batches
from vdm_jax.training.evaluation.sampling import Sampler
from vdm_jax.training.loop import check_changes, train
from vdm_jax.training.run import abstract_state, initial_state, open_run
from vdm_jax.training.runtime.devices import batch_sharding, make_mesh
from vdm_jax.training.runtime.errors import Stopped, UserError
from vdm_jax.training.runtime.metrics_writer import MetricsWriter
from vdm_jax.training.step import make_step


def metrics(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def steps(run):
    return sorted(int(path.name) for path in (run.folder / "checkpoints").iterdir() if path.name.isdigit())


def interrupt_at(monkeypatch, step, signum):
    """Send a signal to this process during a step."""
    advance, done = MetricsWriter.advance, iter(range(1, 10**9))

    def and_signal(self):
        advance(self)
        if next(done) == step:
            signal.raise_signal(signum)

    monkeypatch.setattr(MetricsWriter, "advance", and_signal)


@pytest.mark.parametrize(
    ("signum", "devices", "options"),
    [
        (signal.SIGINT, 1, {"flip": True}),
        pytest.param(signal.SIGTERM, 8, {"accumulate": 2, "lr_schedule": "cosine"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("default_signals")
def test_a_stopped_run_ends_in_the_same_bits_as_an_uninterrupted_one(
    tiny, tmp_path, monkeypatch, devices, options, signum
):
    whole = train(tiny(devices, workdir=str(tmp_path / "whole"), **options))
    run = tiny(devices, workdir=str(tmp_path / "parts"), **options)
    interrupt_at(monkeypatch, 13, signum)
    with pytest.raises(Stopped, match=r"Stopped and saved at step 13. The same command resumes") as stop:
        train(run)
    assert stop.value.signum == signum
    assert steps(run) == [10, 13]
    resumed = train(run)
    assert_same_bits(resumed.state, whole.state)
    assert resumed.notes["data"] == whole.notes["data"]
    losses = {row["step"]: row["loss"] for row in metrics(run)}
    assert [row["step"] for row in metrics(run)] == list(range(5, 45, 5))
    expected = {row["step"]: row["loss"] for row in metrics(tiny(workdir=str(tmp_path / "whole")))}
    assert {**losses, 15: 0} == {**expected, 15: 0}  # the line of step 15 averages over the steps after the stop


def test_the_loop_makes_the_same_updates_as_bare_steps(tiny):
    run = tiny(8, steps=12, log_every=5, checkpoint_every=7, picture_every=3)
    step = make_step(run.experiment, optimizer.optimizer(run.config), run.mesh, seed=0, ema_decay=0.9)
    iterator, state = batches.train_iterator(run.data.train, 32, 0), initial_state(run)
    for _ in range(12):
        state, _ = step(state, jax.device_put(next(iterator), batch_sharding(run.mesh)))
    assert_same_bits(train(run, write_samples=Sampler(run).write_or_warn).state, state)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 20 steps."""
    folder = tmp_path_factory.mktemp("finished")
    train(open_run("tiny", dataclasses.replace(CONFIG, steps=20, log_every=1, workdir=str(folder)), make_mesh(1)))
    return folder


@pytest.fixture
def done(tiny, tmp_path, finished):
    """A copy of the run of 20 steps."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tiny(steps=20, log_every=1)


def restored(run):
    with Checkpoints(run.folder / "checkpoints", run.config.keep) as checkpoints:
        return checkpoints.restore(abstract_state(run))


def test_what_is_saved_last_is_what_is_returned(tiny):
    run = tiny(steps=12)
    final, saved = train(run), restored(run)
    assert_same_bits(saved.state, final.state)
    assert saved.notes["data"] == {"next_index": 12}
    assert int(saved.state.step) == 12


def test_metrics_beyond_the_checkpoint_are_cut_off_on_resume(tiny, done):
    with (done.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "loss": 9.0}\n{"step": 30, "lo')
    damaged = (done.folder / "metrics.jsonl").read_bytes()
    (done.folder / "metrics.jsonl").write_bytes(b'{"a": 1}\nx}\n[]\n\xff\n' + damaged)
    train(tiny(steps=30))
    assert [row["step"] for row in metrics(done)] == [*range(1, 21), 25, 30]
    assert metrics(done)[20]["loss"] != 9.0


def test_metrics_are_means_over_the_steps_since_the_last_line(tiny, done, tmp_path):
    seldom = tiny(steps=20, log_every=20, workdir=str(tmp_path / "seldom"))
    train(seldom)
    mean = np.mean([row["loss"] for row in metrics(done)])
    assert metrics(seldom)[-1]["loss"] == pytest.approx(mean)
    assert metrics(seldom)[-1]["twice"] == pytest.approx(2 * mean)


def test_a_changed_option_is_refused_and_named(tiny, done):
    with pytest.raises(UserError, match=r"(?s)options differ.*--learning-rate: 0.001 -> 0.01.*--fresh"):
        train(tiny(steps=20, learning_rate=0.01))
    with pytest.raises(UserError, match=r"--steps: 5 requested, .* step 20"):
        train(tiny(steps=5))
    assert json.loads((done.folder / "config.json").read_text())["config"]["learning_rate"] == 0.001


def test_a_changed_option_is_accepted_with_changed(tiny, done, capsys):
    run = tiny(steps=30, learning_rate=0.01)
    assert int(train(run, changed=True).state.step) == 30
    out = capsys.readouterr().out
    assert "--learning-rate: 0.001 -> 0.01" in out
    assert "Resuming from step 20 of 30." in out
    assert json.loads((run.folder / "config.json").read_text())["config"]["learning_rate"] == 0.01
    train(tiny(steps=30, learning_rate=0.01))  # the options of the run now
    with pytest.raises(UserError, match=r"--steps: 5 requested, .* step 30"):
        train(tiny(steps=5, learning_rate=0.1), changed=True)


def resume_after_ten_of_ten(run, changed=False):
    """Check a run of these options against a checkpoint of the last of its 10 steps."""
    before = to_json(dataclasses.replace(run.config, steps=10))
    check_changes(run, {"step": 10, "config": before}, to_json(run.config), changed)


def test_more_steps_under_a_cosine_are_a_change_that_names_both_learning_rates(tiny, capsys):
    cosine = {"lr_schedule": "cosine", "learning_rate": 2e-3}
    # the last of 10 updates has 2e-3 (1 + cos(0.9 pi)) / 2, the eleventh of 20 has 2e-3 (1 + cos(pi / 2)) / 2
    with pytest.raises(UserError, match=r"--steps: 10 -> 20: .* jumps from 4.9e-05 to 0.001\n.* --changed"):
        resume_after_ten_of_ten(tiny(steps=20, **cosine))
    resume_after_ten_of_ten(tiny(steps=20, **cosine), changed=True)
    assert "the learning rate jumps from 4.9e-05 to 0.001" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--steps: 9 requested, .* step 10"):
        resume_after_ten_of_ten(tiny(steps=9, **cosine), changed=True)


@pytest.mark.parametrize("options", [{"lr_schedule": "constant"}, {"lr_schedule": "cosine", "warmup_steps": 50}])
def test_more_steps_are_no_change_where_the_learning_rate_does_not_jump(tiny, options, capsys):
    resume_after_ten_of_ten(tiny(steps=20, **options))
    assert not capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tiny):
    poison = next(n for n in range(3, 20) if 12 < first_poisoned(tiny(), n) < 38)
    run = tiny(poison=poison, checkpoint_every=4)
    bad = first_poisoned(run, poison)
    message = rf"(?s)loss nan .* at step {bad}; training stopped.*last good checkpoint is .*--fresh"
    with pytest.raises(UserError, match=message):
        train(run)
    good = (bad - 1) // 4 * 4
    assert max(steps(run)) == good
    saved = restored(run)
    assert int(saved.state.step) == good
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(saved.state.params)))


def first_poisoned(run, poison):
    iterator = batches.train_iterator(run.data.train, run.config.batch_size, run.config.seed)
    return next(i for i in range(1, 1000) if (next(iterator)["label"] == 0).sum() >= poison or i == 999)


def test_a_state_that_is_not_finite_is_never_saved_even_where_the_loss_is(tiny, monkeypatch):
    summarize = checkpoint.summarize
    monkeypatch.setattr(checkpoint, "summarize", lambda state: summarize(state)._replace(finite=bool(state.step < 10)))
    run = tiny(checkpoint_every=5)
    with pytest.raises(UserError, match="state is not finite after step 10"):
        train(run)
    assert steps(run) == [5]


def test_unreadable_checkpoints_are_skipped_and_the_run_ends_the_same(done, finished, capsys):
    for path in (done.folder / "checkpoints" / "20" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    again = train(done)
    assert_same_bits(again.state, restored(done._replace(folder=finished / "tiny")).state)
    out = capsys.readouterr().out
    assert "checkpoint of step 20 cannot be read" in out
    assert "Resuming from step 10" in out
    assert steps(done) == [10, 20]


def test_sample_grids_are_written_during_training(tiny):
    run = tiny(steps=25, picture_every=10)
    train(run, write_samples=Sampler(run).write_or_warn)
    assert sorted(path.name for path in (run.folder / "samples").iterdir()) == ["step_000010.png", "step_000020.png"]
    assert list((run.folder / "tensorboard").glob("events*"))


def test_the_host_does_not_wait_for_each_step(tiny, monkeypatch):
    """Metrics are fetched at log steps only, whatever the number of steps."""
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(1) or get(tree))
    train(tiny(steps=40, log_every=20, checkpoint_every=20, picture_every=0))
    assert len(fetched) <= 6
