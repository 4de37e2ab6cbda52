"""Detection of an accelerator of this machine that JAX does not use."""

import glob
import os
import shutil
import subprocess

import jax

CUDA = ((580, "cuda13"), (525, "cuda12"))  # oldest driver, and the extra that needs it


def idle_accelerator() -> str | None:
    """A message about an NVIDIA GPU or a TPU that is present while JAX runs on the CPU; None if there is none."""
    if jax.default_backend() != "cpu":
        return None
    if driver := _nvidia_driver():
        found = f"an NVIDIA GPU (driver {driver})"
        extra = next((extra for oldest, extra in CUDA if driver >= oldest), None)
        if extra is None:
            return f"JAX runs on the CPU beside {found}: update the driver, JAX needs {CUDA[-1][0]} or newer."
    elif devices := glob.glob("/dev/accel*"):
        found, extra = f"a TPU ({devices[0]})", "tpu"
    else:
        return None
    hidden = os.environ.get("JAX_PLATFORMS")
    remedy = f"unset JAX_PLATFORMS={hidden}, and " if hidden else ""
    return (
        f"JAX runs on the CPU beside {found}: to use it, {remedy}run `make train ACCEL={extra}` or "
        f"`pip install 'jax[{extra}]'`."
    )


def _nvidia_driver() -> int | None:
    """The major version of the NVIDIA driver; None without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    major = output.strip().partition(".")[0]
    return int(major) if major.isdecimal() else None
