"""Scores one file of records with the toolkit's `compute_edit_quality` and with ours; prints where they differ.

    PYTHONPATH=. python tests/evaluation/toolkit_equality.py records.json [count]

One process can hold only one version of the toolkit; `test_toolkit_equality` starts it for each.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import coachhook_plugin  # noqa: F401
from coachhook_plugin.smollm2 import smollm2_path
from coachhook_plugin.toolkit import import_easyeditor
from evaluation.data import load_records
from evaluation.protocol import read, score


def main(path: str, count: int) -> None:
    """Prints the number of figures compared, and the largest difference of each kind and padding side."""
    toolkit: Any = import_easyeditor()
    logging.disable(logging.WARNING)
    folder = smollm2_path()
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = tokenizer.eos_token_id  # as the toolkit's editors set it
    records = load_records(path, count)
    hparams = SimpleNamespace(alg_name="MEMIT", device="cpu", max_length=40, model_name=folder)
    requests = [record.request() for record in records]

    def theirs() -> list[dict[str, Any]]:
        return [
            toolkit.compute_edit_quality(model, folder, hparams, tokenizer, request, "cpu") for request in requests
        ]

    def worst(ours: list[float], their: list[Any]) -> float:
        flat = [float(value) for values in their for value in np.ravel(values)]
        assert len(ours) == len(flat)
        return max(abs(a - b) for a, b in zip(ours, flat, strict=True))

    found: dict[str, Any] = {
        "toolkit": "checkout" if os.environ.get("EASYEDIT_HOME") else importlib.metadata.version("easyeditor"),
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "records": len(records),
        "figures": 0,
    }
    kept = model.lm_head.weight.detach().clone()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        before, their_before = read(model, tokenizer, records), theirs()
        with torch.no_grad():  # an "edit" that changes some answers and not others
            torch.manual_seed(0)
            model.lm_head.weight += 0.02 * torch.randn_like(kept)
        after, their_after = read(model, tokenizer, records), theirs()
        with torch.no_grad():
            model.lm_head.weight.copy_(kept)
        scores = [score(b, a) for b, a in zip(before, after, strict=True)]
        locality = []
        for pre, post in zip(their_before, their_after, strict=True):
            outputs = [name for name in pre["locality"] if name.endswith("_output")]
            shares = [
                np.mean(np.equal(old, new))
                for name in outputs
                for old, new in zip(pre["locality"][name], post["locality"][name], strict=True)
            ]
            locality.append(float(np.mean(shares)))
        kinds = {
            "reliability": ([one.reliability for one in scores], [post["rewrite_acc"] for post in their_after]),
            "generality": (
                [reading.rephrases[0].accuracy for reading in after if reading.rephrases],
                [post["rephrase_acc"] for post in their_after if "rephrase_acc" in post],
            ),
            "locality": ([one.locality for one in scores if one.locality == one.locality], locality),
            "portability": (
                [answer.accuracy for reading in after for answer in reading.portability],
                [values for post in their_after for values in post["portability"].values()],
            ),
        }
        for name, (ours, their) in kinds.items():
            if ours or their:  # what these records have
                found[f"{name}, {side}"] = worst(ours, their)
                found["figures"] += len(ours)
        found[f"changed, {side}"] = float(np.mean([one.locality < 1 for one in scores]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4)
