"""The program that shows whether our engine may stand for the toolkit's MEMIT tells what is equal and what is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
import zoo

from evaluation.data import Record
from evaluation.engine_equality import compare, engine_settings
from evaluation.methods import settings


@pytest.fixture
def sides(tmp_path: Path, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Hyperparameters of both for a tiny model, and the file that says where its statistics come from."""
    if importlib.util.find_spec("easyeditor") is None:
        pytest.skip("the package easyeditor is not installed")
    model = zoo.model("llama", len(tokenizer))
    model.save_pretrained(tmp_path / "tiny-llama")
    tokenizer.save_pretrained(tmp_path / "tiny-llama")
    (tmp_path / "text.txt").write_text(zoo.TEXT, encoding="utf-8")
    tiny = {"model_name": str(tmp_path / "tiny-llama"), "layers": [1, 2], "v_loss_layer": 3, "v_num_grad_steps": 4}
    shared = zoo.hparams(tmp_path / "text.txt", scope_budget=0.05).to_dict() | tiny
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(shared), encoding="utf-8")
    given = {"mom2_dataset": shared["mom2_dataset"], "lm_head_module": "lm_head"}
    theirs = settings("memit", "smollm2-135m", {**tiny, "lm_head_module": "lm_head"})
    return theirs, engine_settings("smollm2-135m") | tiny | given, str(tmp_path / "tiny.yaml")


def test_the_engine_writes_memits_weights_batch_after_batch_and_other_settings_show(
    sides: tuple[dict[str, Any], dict[str, Any], str], tmp_path: Path
) -> None:
    theirs, ours, statistics = sides
    records = [
        Record(str(i), fact["prompt"], fact["subject"], fact["target_new"], "Seoul")
        for i, fact in enumerate(zoo.FACTS)
    ]
    found = compare(records, 2, theirs, ours, statistics, tmp_path)
    assert found["edits"] == len(records)
    assert len(found["relative_difference"]) == 2
    assert max(found["relative_difference"].values()) < 1e-3
    assert found["scores"]["toolkit"] == found["scores"]["engine"]
    other = compare(records, 2, theirs, ours | {"mom2_update_weight": 9000}, statistics, tmp_path)
    assert min(other["relative_difference"].values()) > 1e-2
