"""Python in README and docs runs as printed: each block, or each page of steps, in an interpreter of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ONE_PROGRAM = ["docs/networks.md"]  # their blocks build on one another
TRAIN = ["train", "ddpm_digits", "--steps", "2", "--eval-examples", "2", "--eval-terms", "2", "--num-samples", "0"]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    f"{page}, block {i + 1}": code for page in PAGES if page not in ONE_PROGRAM for i, code in enumerate(blocks(page))
}


@pytest.fixture(scope="module")
def folder_with_a_run(tmp_path_factory) -> Path:
    """A folder with runs/ddpm_digits, hardly trained, which pages on runs load."""
    folder = tmp_path_factory.mktemp("trained")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "vdm_jax", *TRAIN], cwd=folder, env=environment, check=True)
    return folder


def run(code: str, folder: Path | None = None) -> str:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error::DeprecationWarning:__main__", "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_readme_has_an_example():
    assert "README.md, block 1" in PROGRAMS


@pytest.mark.parametrize(
    "name", [name if name.startswith("README") else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS]
)
def test_a_block_runs_on_its_own(name, request):
    loads = "load_run(" in PROGRAMS[name]
    printed = run(PROGRAMS[name], request.getfixturevalue("folder_with_a_run") if loads else None)
    assert "print(" not in PROGRAMS[name] or printed.strip()
    assert "nan" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("page", ONE_PROGRAM)
def test_a_page_of_steps_runs_as_one_program(page):
    run("\n".join(blocks(page)))
