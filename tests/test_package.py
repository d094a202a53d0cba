"""The package by itself: it needs no toolkit, changes nothing around it, and exports what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_what_is_exported_is_there() -> None:
    assert all(hasattr(coachhook_plugin, name) for name in coachhook_plugin.__all__)
    with pytest.raises(AttributeError, match="nothing_like_that"):
        _ = coachhook_plugin.nothing_like_that


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
