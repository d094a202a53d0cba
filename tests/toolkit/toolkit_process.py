"""Runs a file of scenarios in a process of its own for each version of EasyEdit: one process can hold only one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from toolkit_scenarios import BOTH, HEAD

HERE = Path(__file__).parent


def cases(names: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """(version, name) for each name and the versions it is for; all of one version together."""
    return [(version, name) for version in BOTH for name, versions in names.items() if version in versions]


class Outcomes:
    """What became of the scenarios of one file; a version's process runs when its first outcome is asked for."""

    def __init__(self, program: str) -> None:
        self.program = program
        self._found: dict[str, dict[str, str]] = {}

    def check(self, version: str, name: str, folder: Path) -> None:
        """Pass, fail or skip as the scenario did."""
        if version in HEAD and not os.environ.get("EASYEDIT_HOME"):
            pytest.skip("EASYEDIT_HOME is not set: no checkout of EasyEdit to test with")
        if version not in HEAD and importlib.util.find_spec("easyeditor") is None:
            pytest.skip("the package easyeditor is not installed")
        if version not in self._found:
            self._found[version] = self._run(version, folder)
        if self._found[version][name]:
            pytest.fail(self._found[version][name], pytrace=False)

    def _run(self, version: str, folder: Path) -> dict[str, str]:
        environment = dict(os.environ)
        if version not in HEAD:
            environment.pop("EASYEDIT_HOME", None)
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
        written = folder / "results.json"
        command = [sys.executable, str(HERE / self.program), str(written)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(written.read_text())
        assert found["version"] == version
        results: dict[str, str] = found["results"]
        return results
