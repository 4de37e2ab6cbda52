"""The training room: every effect of the project (files, clocks, signals, devices) lives here and nowhere else.

It knows nothing of diffusion. An experiment hands it four pure functions (`contract.Experiment`) and gets back a run
folder with metrics, checkpoints, pictures and a report.

    config      TrainConfig, and its way to JSON and back
    contract    DataSpec, Experiment, Samples: what passes between an experiment and the loop
    data        the digits or a TFDS image set -> batches in a reproducible order
    optimizer   learning rate schedule, clipping, Adam or AdamW
    state       TrainState and its exponential moving average
    step        one update as one `jit` over all local devices
    checkpoint  Orbax: save, resume, fall back
    loop        the loop itself
    evaluate    means and standard errors over the whole test set -> report.json
    pictures    sample grids and the trajectory
    patience    whether the report is put off because it would outlast the training
"""

import importlib.util
import sys

_NEEDED = ("grain", "matplotlib", "optax", "orbax", "tensorboardX", "tensorflow_datasets", "tqdm", "tyro")

if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    _message = f"vdm_jax.training needs {', '.join(_missing)}, which are not installed: pip install 'vdm_jax[train]'"
    # `python -m vdm_jax.training` prints one line, and no traceback.
    raise SystemExit(_message) if sys.argv[0] == "-m" else ImportError(_message)
