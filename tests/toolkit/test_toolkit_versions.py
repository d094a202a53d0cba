"""CoachHooK inside both versions of EasyEdit: `toolkit_scenarios`, run in one process for each version."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toolkit_scenarios import BOTH, HEAD, SCENARIOS

HERE = Path(__file__).parent
IMPORT = "importing_the_toolkit_leaves_random_numbers_alone"
NAMES = {IMPORT: BOTH} | {name: versions for name, (versions, _) in SCENARIOS.items()}
CASES = [(version, name) for version in BOTH for name, versions in NAMES.items() if version in versions]
Outcomes = dict[str, dict[str, str]]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Filled by the first test of each version."""
    return {}


def _run(version: str, folder: Path) -> dict[str, str]:
    environment = dict(os.environ)
    if version == "release":
        environment.pop("EASYEDIT_HOME", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    written = folder / "results.json"
    command = [sys.executable, str(HERE / "toolkit_scenarios.py"), str(written)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(written.read_text())
    assert found["version"] == version
    results: dict[str, str] = found["results"]
    return results


@pytest.mark.parametrize(("version", "name"), CASES, ids=[f"{version}-{name}" for version, name in CASES])
def test_in_easyedit(version: str, name: str, outcomes: Outcomes, tmp_path: Path) -> None:
    if version in HEAD and not os.environ.get("EASYEDIT_HOME"):
        pytest.skip("EASYEDIT_HOME is not set: no checkout of EasyEdit to test with")
    if version not in HEAD and importlib.util.find_spec("easyeditor") is None:
        pytest.skip("the package easyeditor is not installed")
    if version not in outcomes:
        outcomes[version] = _run(version, tmp_path)
    if outcomes[version][name]:
        pytest.fail(outcomes[version][name], pytrace=False)
