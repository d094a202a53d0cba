"""CoachHooK as a run sees it: what the analysis of the key token (paper, Figure 3) is drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from coachhook_plugin.tokens import parse_requests
from coachhook_plugin.trace import captured
from evaluation.data import Record
from evaluation.methods import CoachHooK
from evaluation.methods.coachhook import without_contradictions


def test_the_key_tokens_norm_is_that_of_what_the_edits_add_at_the_subjects_last_token(
    tmp_path: Path, tokenizer: Any
) -> None:
    pytest.importorskip("easyeditor")
    plain = zoo.model("llama", len(tokenizer))
    plain.save_pretrained(tmp_path / "tiny-llama")
    tokenizer.save_pretrained(tmp_path / "tiny-llama")
    (tmp_path / "text.txt").write_text(zoo.TEXT, encoding="utf-8")
    settings = zoo.hparams(tmp_path / "text.txt", layers=[1, 2], scope_budget=0.05, v_num_grad_steps=4)
    settings.model_name, settings.device = str(tmp_path / "tiny-llama"), "cpu"
    method = CoachHooK(settings)
    records = [Record(str(i), f["prompt"], f["subject"], f["target_new"]) for i, f in enumerate(zoo.FACTS)]
    method.edit(records)
    for record in records:
        norms, place = method.norms(record)
        ids = tokenizer(record.prompt)["input_ids"]
        assert tokenizer.decode(ids[: place + 1]).endswith(record.subject)
        assert set(norms) == {1, 2}
        assert all(len(of) == len(ids) for of in norms.values())
        # The first layer's keys are those of the unedited model.
        with torch.no_grad(), captured(plain.model.layers[1].mlp.down_proj) as seen:
            plain(input_ids=torch.tensor([ids]))
        added = seen.input[0] @ method.session.state.layers[1].delta.T  # (t, d)
        assert norms[1] == pytest.approx(added.norm(dim=-1).tolist(), rel=1e-4)


def test_two_targets_for_one_prompt_do_not_end_a_run_and_the_later_one_holds() -> None:
    """MQuAKE's cases share facts, and tell different targets for some."""
    told = ["Rome>Spain", "Oslo>Chile", "Rome>Spain", "Rome>Peru", "Oslo>Chile", "Oslo>Kenya"]
    records = [
        Record(str(i), f"{subject} lies in", subject, target)
        for i, (subject, _, target) in enumerate(text.partition(">") for text in told)
    ]
    assert without_contradictions(records[:3]) == [records[:3]]  # told twice alike: one batch
    parts = without_contradictions(records)
    assert [len(part) for part in parts] == [3, 2, 1]
    assert [record for part in parts for record in part] == records
    for part in parts:
        parse_requests([record.request() for record in part])
    with pytest.raises(ValueError, match="contradicts"):
        parse_requests([record.request() for record in records])
