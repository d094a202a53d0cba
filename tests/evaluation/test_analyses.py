"""The paper's analyses: what was swept is found, and the key token's z is the paper's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib import image
from test_leaderboard import change, job

from evaluation.analyses import (
    draw_key_token,
    draw_sweep,
    draw_sweeps,
    has_key_scores,
    key_token,
    key_token_table,
    swept,
    value_of,
    z_scores,
)
from evaluation.leaderboard import load_jobs, row_of

CONF = Path(__file__).parents[2] / "evaluation" / "conf"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for i, value in enumerate((50, 500, 15000)):
        job(tmp_path / f"jobs/{i}", "CoachHooK", i + 1, mom2_update_weight=value, kept=1)
    return tmp_path


def test_what_was_swept_becomes_the_axis(sweep: Path) -> None:
    rows = [row_of(one) for one in load_jobs(sweep)]
    assert swept(rows) == "mom2_update_weight"
    assert [value_of(row, "mom2_update_weight") for row in rows] == [50, 500, 15000]
    assert draw_sweeps(load_jobs(sweep), sweep) == [sweep / "mom2_update_weight.png"]
    pixels = image.imread(sweep / "mom2_update_weight.png")
    assert pixels[..., :3].std() > 0.02  # not blank
    assert swept(rows[:1]) is None


def test_one_line_never_joins_two_data_sets_or_methods(sweep: Path) -> None:
    for i, value in enumerate((50, 500)):
        job(sweep / f"jobs/other-{i}", "Other", 1, mom2_update_weight=value)
        job(sweep / f"jobs/elsewhere-{i}", "CoachHooK", 1, mom2_update_weight=value)
        change(sweep / f"jobs/elsewhere-{i}", dataset={"name": "rivers"})
    job(sweep / "jobs/alone", "Alone", 1, mom2_update_weight=3)
    parts = ("coachhook-towns", "other-towns", "coachhook-rivers")
    expected = {f"mom2-update-weight-{part}-4-edits-consecutive-tiny.png" for part in parts}
    drawn = draw_sweeps(load_jobs(sweep), sweep)
    assert {path.name for path in drawn} == expected
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_what_is_swept_may_be_a_word(tmp_path: Path) -> None:
    for value in ("mean", "boundary"):
        job(tmp_path / f"jobs/{value}", "CoachHooK", 1, spread=value)
    rows = [row_of(one) for one in load_jobs(tmp_path)]
    figure = draw_sweep(rows, "spread", "CoachHooK, towns", tmp_path / "spread.png")
    left = figure.axes[0]
    assert [label.get_text() for label in left.get_xticklabels()] == ["boundary", "mean"]
    assert [list(line.get_xdata()) for line in left.lines[:1]] == [[0.0, 1.0]]


def test_layers_are_counted(tmp_path: Path) -> None:
    job(tmp_path / "jobs/a", "CoachHooK", 1, layers=[7, 8])
    (found,) = load_jobs(tmp_path)
    assert value_of(row_of(found), "layers") == 2


def test_z_is_that_of_the_paper() -> None:
    norms = [0.5, 0.1, 3.0, 0.2]
    assert z_scores(norms) == pytest.approx((np.array(norms) - np.mean(norms)) / np.std(norms, ddof=1))
    assert z_scores([1.0, 1.0]) == [0.0, 0.0]
    assert z_scores([1.0]) == [0.0]


def test_the_key_token_is_compared_with_the_mean_of_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "jobs/a"
    job(folder, "CoachHooK", 1)
    assert not has_key_scores(load_jobs(tmp_path)[0])
    for path in sorted((folder / "phases").glob("after-*.jsonl")):
        told, *rows = (json.loads(line) for line in path.read_text().split("\n") if line)
        more: dict[str, Any] = {"norms": {"4": [0.0, 3.0, 0.0], "5": [0.0, 0.0, 3.0]}, "subject": 1}
        path.write_text("\n".join(json.dumps(line) for line in [told, *({**row, **more} for row in rows)]))
    (found,) = load_jobs(tmp_path)
    assert has_key_scores(found)
    scores = key_token(found)
    high, low = z_scores([0.0, 3.0, 0.0])[1::-1]
    assert scores["4"] == {2: pytest.approx((high, low)), 4: pytest.approx((high, low))}
    assert scores["5"][4] == pytest.approx((low, (low + high) / 2))
    assert key_token_table(scores).splitlines()[1] == f"4,2,{high:.4f},{low:.4f}"
    draw_key_token(scores, tmp_path / "key.png")
    assert (tmp_path / "key.png").stat().st_size > 5000


def test_every_analysis_of_the_paper_is_a_configuration() -> None:
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "experiment").glob("*.yaml")}
    assert set(found) >= {"batch_size", "lambda", "alpha", "layers", "key_token", "stability"}
    values = found["lambda"]["hydra"]["sweeper"]["params"]["+method.overrides.mom2_update_weight"].split(",")
    assert len(values) == 5
