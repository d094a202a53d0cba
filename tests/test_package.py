"""The package by itself: it needs no toolkit, changes nothing around it, and exports what it says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import coachhook_plugin

ROOT = Path(__file__).parent.parent


def python(program: str, folder: Path) -> str:
    """What a fresh interpreter prints, started elsewhere with only the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "EASYEDIT_HOME"}
    environment |= {"PYTHONPATH": str(ROOT), "COACHHOOK_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKED = """
import sys

class Blocked:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "easyeditor":
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def test_without_the_toolkit_a_model_is_edited_and_only_its_editor_is_missing(tmp_path: Path) -> None:
    program = f"""
{BLOCKED}
import random, numpy, torch
from transformers import PreTrainedModel  # draws some itself

def drawn_from():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

before = drawn_from()
import coachhook_plugin
assert drawn_from() == before  # the import draws no random numbers
sys.path.insert(0, {str(ROOT / "tests")!r})
import zoo
open("text.txt", "w").write(zoo.TEXT)
tokenizer = zoo.tokenizer()
model = zoo.model("llama", len(tokenizer))
session = coachhook_plugin.EditSession(model, tokenizer, zoo.hparams("text.txt"), progress=False)
session.edit(zoo.FACTS)
assert len(session) == len(zoo.FACTS)
assert not Blocked.asked, Blocked.asked
assert not any(name.split(".")[0] == "easyeditor" for name in sys.modules)
try:
    coachhook_plugin.CoachHooKEditor
except ImportError as error:
    print("missing:", error)
"""
    said = python(program, tmp_path)
    assert said.startswith("missing: ")  # and nothing is printed before
    assert "easyeditor" in said.lower()


def test_the_import_waits_for_no_more_than_torch(tmp_path: Path) -> None:
    """`coachhook show`, and each process of a sweep, would wait three times as long."""
    asked = "{'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    assert python(f"import sys, coachhook_plugin.cli.main; print({asked})", tmp_path) == "{'torch'}\n"


def test_what_is_exported_is_there() -> None:
    assert all(hasattr(coachhook_plugin, name) for name in coachhook_plugin.__all__)
    with pytest.raises(AttributeError, match="nothing_like_that"):
        _ = coachhook_plugin.nothing_like_that


def test_what_the_package_imports_is_what_it_asks_to_be_installed() -> None:
    """`pip install .` alone must do, and must not bring what only the evaluation or the tests need."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = {re.split(r"[^\w-]", line)[0].lower() for line in tomllib.loads(pyproject)["project"]["dependencies"]}
    imported: set[str] = set()
    for path in (ROOT / "coachhook_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    others = imported - sys.stdlib_module_names - {"coachhook_plugin"}
    names = {"yaml": "pyyaml"}
    optional = {"easyeditor", "datasets", "gguf"}  # their absence is told when they are asked for
    assert {names.get(name, name) for name in others} - optional == asked


def test_only_the_toolkit_door_names_easyeditor() -> None:
    """An import of easyeditor anywhere else would make the toolkit a dependency of the method."""
    package = ROOT / "coachhook_plugin"
    importing = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if any(
            line.strip().startswith(("import easyeditor", "from easyeditor")) for line in path.open(encoding="utf-8")
        )
    }
    assert importing <= {"toolkit", "editor.py"}
