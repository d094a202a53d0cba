"""The measurement of forgetting, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
import zoo

from evaluation.forget import run


def test_what_is_forgotten_and_what_stays_are_told_apart(
    tmp_path: Path, tiny: Any, tokenizer: Any, settings: Any
) -> None:
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    hparams = settings(model_name=str(tmp_path / "model"), v_num_grad_steps=2)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**hparams.to_dict(), "device": "cpu"}))
    records = [
        {
            **fact,
            "case_id": i,
            "ground_truth": "old",
            "rephrase_prompt": f"They say: {fact['prompt']}",
            "locality_prompt": "Many books",
            "locality_ground_truth": "city",
        }
        for i, fact in enumerate(zoo.FACTS)
    ]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    found = run(str(tmp_path / "tiny.yaml"), tmp_path / "facts.json", 4, 1, 0, zoo.TEXT[:200], tmp_path / "edits")
    assert (found["forgotten"]["count"], found["others"]["count"]) == (1, 3)
    assert found["forgotten"]["same_answer"] == 1
    assert found["forgotten"]["after"] == found["forgotten"]["before"]
    for group in ("forgotten", "others"):
        of = found[group]
        assert of["before"]["locality"] == 1
        assert 0 <= of["same_continuation"] <= of["count"]
        assert of["count"] - of["same_answer"] == len(of["other_answer"])
    disk = found["disk"]
    assert disk["low_rank_float32"] == 4 * 2 * (32 + 48) * 4
    assert disk["ratio"] == round(disk["without_memory"] / min(disk["low_rank_float32"], disk["dense_float32"]), 4)
    assert disk["without_memory"] == sum(size for name, size in disk["files"].items() if "memory" not in name)
