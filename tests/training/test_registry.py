"""Recipes by name from any folder, and by the path of a user's own file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vdm_jax.training import registry
from vdm_jax.training.cli import main as entry
from vdm_jax.training.runtime import invocation
from vdm_jax.training.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
OWN = """from dataclasses import replace
from vdm_jax.experiments import ddpm_digits
from beside import STEPS
CONFIG = replace(ddpm_digits.CONFIG, steps=STEPS)
"""


def call(arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_recipes_are_found_from_a_folder_with_experiments_of_its_own(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/__init__.py").touch()
    (tmp_path / "experiments/ddpm_digits.py").write_text("raise RuntimeError('not this one')")
    program = """
from vdm_jax.training.cli.main import main
from vdm_jax.training.registry import find
print(find("ddpm_digits_cond").num_samples, flush=True)
main(["train"])
"""
    code, output = call(["-c", program], tmp_path)
    assert code == 1
    assert output.startswith("100\n")
    names = [path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__"]
    assert ", ".join(sorted(names)) in output


def test_an_installed_package_has_its_recipes_inside(tmp_path, monkeypatch):
    inside = tmp_path / "vdm_jax" / "experiments"
    inside.mkdir(parents=True)
    (inside / "__init__.py").touch()
    monkeypatch.setattr(registry, "FOLDERS", (inside, ROOT / "experiments"))
    assert registry.recipe_folder() == inside
    monkeypatch.setattr(registry, "FOLDERS", (tmp_path / "gone",))
    with pytest.raises(UserError, match="Reinstall vdm_jax"):
        registry.recipe_names()


def test_a_recipe_of_one_s_own_builds_on_others(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("STEPS = 7")
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("mine.py", "./mine.py", str(tmp_path / "mine.py")):
        assert (registry.find(name).steps, registry.run_name(name)) == (7, "mine")
    sys.modules.pop("beside")


def test_the_path_of_a_recipe_of_the_project_is_its_name():
    assert registry.find(str(ROOT / "experiments" / "ddpm_digits_cond.py")) is registry.find("ddpm_digits_cond")


def test_paths_of_no_recipe_are_one_message(tmp_path):
    (tmp_path / "text.txt").write_text("CONFIG = 1")
    (tmp_path / ".py").write_text("CONFIG = 1")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "none.py").write_text("")
    for name, message in [
        ("missing.py", "no recipe file .*missing.py.*ddpm_digits"),
        ("folder.py", "no recipe file"),
        ("text.txt", "must be named NAME.py"),
        (".py", "must be named NAME.py"),
        ("none.py", "none.py must define CONFIG"),
    ]:
        with pytest.raises(UserError, match=message):
            registry.find(str(tmp_path / name))


def test_the_command_names_what_it_has(capsys, tmp_path):
    entry.main(["--help"], "vdm-jax")
    output = capsys.readouterr().out
    assert "usage: vdm-jax COMMAND" in output
    assert all(f"  {name} " in output for name in ("train", "sample", "evaluate", "compare", "import"))
    with pytest.raises(SystemExit, match="unknown command 'trian'"):
        entry.main(["trian"], "vdm-jax")
    with pytest.raises(SystemExit, match="usage: python -m vdm_jax COMMAND"):
        entry.main([], "python -m vdm_jax")
    assert "usage: python -m vdm_jax sample RECIPE" in call(["-m", "vdm_jax", "sample"], tmp_path)[1]


@pytest.mark.slow
def test_the_module_of_training_names_itself(tmp_path):
    assert "usage: python -m vdm_jax.training RECIPE" in call(["-m", "vdm_jax.training"], tmp_path)[1]


def test_messages_name_the_command_as_the_user_types_it(monkeypatch):
    assert invocation.command_line("evaluate", "x.py", "--rows none") == "vdm-jax evaluate x.py --rows none"
    monkeypatch.setenv(invocation.MADE, "1")
    assert invocation.command_line("evaluate", "x.py", "--rows none") == 'make eval EXP=x.py ARGS="--rows none"'
    assert invocation.command_line("train", "ddpm_digits") == "make train EXP=ddpm_digits"
