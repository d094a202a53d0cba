"""The scope study: what it reports is what the gates did and what the model said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zoo
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evaluation.scope_report import draw, roc
from evaluation.scope_study import COLUMNS, GROUPS, SCOPES, run, show, summary

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=20)


@given(SCORES, SCORES)
def test_every_point_of_the_curve_is_what_its_threshold_lets_in(inside: list[float], outside: list[float]) -> None:
    x, y = roc(inside, outside)
    thresholds = sorted({*inside, *outside}, reverse=True)
    assert len(x) == len(thresholds)
    for threshold, other, own in zip(thresholds, x, y, strict=True):
        assert other == pytest.approx(np.mean([score >= threshold for score in outside]))
        assert own == pytest.approx(np.mean([score >= threshold for score in inside]))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> list[dict[str, Any]]:
    """Two runs on a tiny model."""
    folder = tmp_path_factory.mktemp("study")
    model = zoo.model("llama", len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(zoo.TEXT, encoding="utf-8")
    settings = zoo.hparams(folder / "text.txt", scope_budget=0.05, v_num_grad_steps=3).to_dict()
    settings["model_name"] = str(folder / "model")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    facts = [
        {**fact, "rephrase_prompt": f"People say that {fact['prompt']}", "locality_prompt": "The best dish comes from"}
        | {"locality_ground_truth": "Rome", "case_id": i, "ground_truth": "Seoul"}
        for i, fact in enumerate(zoo.FACTS)
    ]
    # A prompt without its subject is left out by the loader, not edited.
    facts.append({**facts[0], "subject": "Nobody"})
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    files = (folder / "facts.json", folder / "text.txt")
    return [run(str(folder / "tiny.yaml"), scope, *files, edits=10, batch_size=1) for scope in SCOPES]


def test_a_run_reports_every_promised_figure(study: list[dict[str, Any]]) -> None:
    for one in json.loads(json.dumps(study, allow_nan=False)):
        assert one["edits"] == len(zoo.FACTS)
        assert list(one["margins"]) == ["1", str(len(zoo.FACTS))]
        assert all(0 <= one[name] <= 1 for name in COLUMNS if name != "perplexity_ratio")
        last = one["margins"][str(len(zoo.FACTS))]
        assert set(last) == set(GROUPS)
        assert len(last["edited"]) == len(last["rephrased"]) == len(zoo.FACTS)
        assert one["open_rate_text"] == np.mean([margin >= 1 for margin in last["text"]])


def test_a_causal_scope_generates_alike_with_and_without_a_cache(study: list[dict[str, Any]]) -> None:
    for one in study:
        assert one["scope"] == "zscore" or one["cached_as_uncached"] == 1


def test_the_report_shows_both_scopes(study: list[dict[str, Any]], tmp_path: Path) -> None:
    told = json.loads(json.dumps(study))
    figures = summary(told)
    assert figures["facts"].keys() == SCOPES.keys()
    last = str(len(zoo.FACTS))
    for one in told:
        rates = figures["facts"][one["scope"]]["open_rates"][last]
        assert rates["text"] == one["open_rate_text"]
    console = Console(width=200, record=True)
    show(figures, console)
    text = console.export_text()
    assert "leverage" in text
    assert f"{figures['facts']['zscore']['locality']:.3f}" in text
    draw(told, tmp_path / "scope.png")
    assert (tmp_path / "scope.png").stat().st_size > 10_000
