"""JAX on the CPU beside an idle GPU or TPU."""

import jax
import pytest

from vdm_jax.training.cli import train as training
from vdm_jax.training.runtime import accelerator
from vdm_jax.training.runtime.errors import UserError


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """`nvidia_smi("echo 580.1")`: a program of this name, the only one on the PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(accelerator.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def make(script):
        path = tmp_path / "bin" / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("script", "parts"),
    [
        ("echo 580.65.06", ["NVIDIA GPU (driver 580)", "ACCEL=cuda13", "jax[cuda13]"]),
        ("echo 535.1; echo 535.1", ["NVIDIA GPU (driver 535)", "ACCEL=cuda12"]),
        ("echo 470.82", ["driver 470", "update the driver", "525"]),
        ("echo no devices were found; exit 6", []),
    ],
)
def test_an_idle_gpu_is_named_with_the_remedy(nvidia_smi, script, parts):
    nvidia_smi(script)
    message = accelerator.idle_accelerator()
    assert all(part in (message or "") for part in parts)
    assert bool(message) == bool(parts)


def test_an_idle_tpu_is_named_with_the_remedy(nvidia_smi, monkeypatch):
    assert accelerator.idle_accelerator() is None
    monkeypatch.setattr(accelerator.glob, "glob", lambda pattern: ["/dev/accel0"])
    assert "ACCEL=tpu" in accelerator.idle_accelerator()


def test_the_variable_that_hides_it_is_named(nvidia_smi, monkeypatch):
    nvidia_smi("echo 580.1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "unset JAX_PLATFORMS=cpu" in accelerator.idle_accelerator()


def test_there_is_no_message_if_jax_uses_the_accelerator(nvidia_smi, monkeypatch):
    nvidia_smi("echo 580.1")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert accelerator.idle_accelerator() is None


def test_it_is_printed_before_a_run(nvidia_smi, command, monkeypatch):
    def train(*_):
        raise UserError("this is a run")

    nvidia_smi("echo 580.1")
    monkeypatch.setattr(training, "train_and_report", train)
    code, output = command(training.main, "tiny", "--steps", "1", "--num-samples", "0")
    assert code == 1
    assert 0 <= output.index("ACCEL=cuda13") < output.index("this is a run")
