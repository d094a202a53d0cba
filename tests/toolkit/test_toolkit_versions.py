"""CoachHooK inside both versions of EasyEdit: `toolkit_scenarios`, run in one process for each version."""

from __future__ import annotations

from pathlib import Path

import pytest
from toolkit_process import Outcomes, cases
from toolkit_scenarios import BOTH, SCENARIOS

IMPORT = "importing_the_toolkit_leaves_random_numbers_alone"
CASES = cases({IMPORT: BOTH} | {name: versions for name, (versions, _) in SCENARIOS.items()})


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return Outcomes("toolkit_scenarios.py")


@pytest.mark.parametrize(("version", "name"), CASES, ids=[f"{version}-{name}" for version, name in CASES])
def test_in_easyedit(version: str, name: str, outcomes: Outcomes, tmp_path: Path) -> None:
    outcomes.check(version, name, tmp_path)
