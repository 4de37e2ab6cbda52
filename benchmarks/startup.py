"""Startup time of a training run, with and without the cache of compiled programs; and import times.

    python -m benchmarks.startup [ddpm_digits]

Every row is measured in a process that does what `vdm-jax train NAME` does, up to the end of its first step. The cache
is a new folder: empty for the first process, full for the others. CPU time is that of all cores together, which other
programs disturb less.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

IMPORTS = ("vdm_jax", "vdm_jax.losses", "vdm_jax.samplers", "vdm_jax.training.loop", "vdm_jax.models.ddpm")
PACKAGES = "scipy diffrax flax.linen optax orbax.checkpoint grain sklearn tyro matplotlib tensorboardX".split()
PHASES = """
import json, sys, time
began, name, folder, times = float(sys.argv[1]), sys.argv[2], sys.argv[3], {}
def mark(what):
    times[what] = time.time() - began, time.process_time()
mark("interpreter")
from vdm_jax.training.runtime import environment
environment.prepare()
mark("jax")
from vdm_jax.training.cli import train as command
from vdm_jax.training.evaluation import dry_run
from vdm_jax.training.loop import Checkpoints, Loop, MetricsWriter, start_or_resume
from vdm_jax.training.run import open_run
mark("trainer")
name, config, *_ = command.parse([name, "--workdir", folder, "--steps", "1"], "vdm-jax train")
mark("recipe and options")
run = open_run(name, config)
mark("data and model")
step = dry_run.check_training(run, likelihood=False)
mark("dry run")
dry_run.check_evaluation(run, run.experiment.likelihood_rows)
mark("dry run of the likelihood report, for a new run")
with Checkpoints(run.folder / "checkpoints") as checkpoints:
    start = start_or_resume(run, checkpoints)
    start.state.step.block_until_ready()
    mark("initial state")
    with MetricsWriter(run.folder, 0, 1) as writer:
        loop = Loop(run, start, checkpoints, writer, step)
        mark("loop")
        loop.advance(1)
        loop.state.step.block_until_ready()
        mark("first step")
        loop.batches.close()
print(json.dumps(times))
"""


def phases(name: str, cache: str) -> dict[str, np.ndarray]:
    """Wall time and CPU time in seconds of each phase of one process, by name, in order."""
    with tempfile.TemporaryDirectory() as folder:
        given = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        command = [sys.executable, "-c", PHASES, str(time.time()), name, folder]
        done = subprocess.run(command, env=given, check=True, capture_output=True, text=True)
    times = json.loads(done.stdout.splitlines()[-1])
    rows = dict(zip(times, np.diff(list(times.values()), axis=0, prepend=0.0), strict=True))
    return {**rows, "total": np.sum(list(rows.values()), axis=0)}


def first_steps(name: str, warm: int = 5) -> None:
    """The table of phases."""
    with tempfile.TemporaryDirectory() as cache:
        cold = phases(name, cache)
        rows = [phases(name, cache) for _ in range(warm)]
    print(f"| {name} | cold cache | CPU time | warm cache | CPU time |\n|---|---|---|---|---|")
    for what, (clock, work) in cold.items():
        cells = [_spread([row[what][i] for row in rows]) for i in range(2)]
        print(f"| {what} | {clock:.2f} s | {work:.2f} s | {' | '.join(cells)} |", flush=True)


def imports(module: str) -> dict[str, float]:
    """Import time in seconds of a module after JAX, in a new process, and of the heavy packages that it imports."""
    command = [sys.executable, "-X", "importtime", "-c", f"import jax, {module}"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    found = [re.fullmatch(r"import time:\s*\d+ \|\s*(\d+) \|\s*(\S+)", line) for line in lines]
    seconds = {match[2]: int(match[1]) / 1e6 for match in found if match}
    return {name: seconds[name] for name in (module, "jax", *PACKAGES) if name in seconds}


def _spread(values: list[float]) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f}) s"


def main(name: str = "ddpm_digits") -> None:
    """Print both tables."""
    print("| import | after JAX | heavy packages | JAX itself |\n|---|---|---|---|")
    for module in IMPORTS:
        rows = [imports(module) for _ in range(5)]
        heavy = [part for part in PACKAGES if part in rows[0] and np.median([row[part] for row in rows]) > 0.05]
        parts = ", ".join(f"{part} {np.median([row[part] for row in rows]):.2f}" for part in heavy)
        own, jax = (_spread([row[part] for row in rows]) for part in (module, "jax"))
        print(f"| {module} | {own} | {parts} | {jax} |", flush=True)
    print()
    first_steps(name)


if __name__ == "__main__":
    main(*sys.argv[1:2])
