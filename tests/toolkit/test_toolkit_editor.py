"""`CoachHooKEditor` in both versions of EasyEdit (`toolkit_editor_scenarios`), and without EasyEdit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toolkit_editor_scenarios import SCENARIOS
from toolkit_process import Outcomes, cases

CASES = cases({name: versions for name, (versions, _) in SCENARIOS.items()})

# `easyeditor` is nowhere to be found, whatever is installed.
WITHOUT_EASYEDIT = """
import importlib.machinery, sys

find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *args, **kwargs: None if name == "easyeditor" else find(name, *args, **kwargs)
)
import coachhook_plugin
from coachhook_plugin import *

print(coachhook_plugin.EditSession.__name__)
for _ in range(2):
    try:
        from coachhook_plugin import CoachHooKEditor
    except ImportError as error:
        print(error)
try:
    coachhook_plugin.CoachHookEditor
except AttributeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return Outcomes("toolkit_editor_scenarios.py")


@pytest.mark.parametrize(("version", "name"), CASES, ids=[f"{version}-{name}" for version, name in CASES])
def test_editor(version: str, name: str, outcomes: Outcomes, tmp_path: Path) -> None:
    outcomes.check(version, name, tmp_path)


def test_without_easyedit_only_the_editor_is_missing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "EASYEDIT_HOME"}
    command = [sys.executable, "-c", WITHOUT_EASYEDIT]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    name, *errors, unknown = done.stdout.splitlines()
    assert name == "EditSession"
    assert len(errors) == 2
    for error in errors:
        assert "EasyEdit is not installed" in error
        assert "EASYEDIT_HOME" in error
        assert "pip install" in error
    assert "CoachHookEditor" in unknown
