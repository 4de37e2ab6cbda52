"""Training, evaluation and sampling. All effects of the package (files, clocks, signals, devices) are in here.

The training loop knows nothing of diffusion: a model hands it an `experiment.Experiment`, four pure functions and what
to report beside them, and the loop makes a run folder with metrics, checkpoints, plots and a report.

    experiment        Experiment, SampleBatch: the interface between a model and the loop
    config            TrainConfig, the options that all recipes share, to and from JSON
    validation        types and limits of options
    registry          recipes by name or path
    run               Run: a recipe with its data, model, devices and folder
    optimizer         learning rate schedule, clipping, Adam or AdamW
    state             TrainState and the exponential moving average
    keys              random keys from one seed
    step              one update as one `jit` over all devices
    checkpoint        Orbax: save, restore, skip unreadable checkpoints
    integrity         checksums of checkpoints
    loop              the training loop
    imported_weights  a run that starts from given parameters
    trained_run       load_run: a trained run as a denoiser, schedule, decoder and data

Each folder imports only those before it (and the files above come between `data` and `evaluation`):

    runtime           devices, processes, files, signals, errors, metrics
    data              data sets, augmentation, batches
    evaluation        likelihood report, sample quality, samples and plots of a trained model
    cli               the commands
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdm_jax.training.trained_run import TrainedRun, load_run

__all__ = ["TrainedRun", "load_run"]

_NEEDED = ("grain", "matplotlib", "optax", "orbax", "tensorboardX", "tensorflow_datasets", "tqdm", "tyro")

if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    _message = f"vdm_jax.training needs {', '.join(_missing)}, which are not installed: pip install 'vdm_jax[train]'"
    # `python -m vdm_jax.training` prints this line without a traceback.
    raise SystemExit(_message) if sys.argv[0] == "-m" else ImportError(_message)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("vdm_jax.training.trained_run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
