"""Keys and values at the subject: through token trees they are those of each text run alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo

from coachhook_plugin.activations import subject_keys, subject_values
from coachhook_plugin.architectures import model_parts
from coachhook_plugin.tokens import Encoder, parse_requests

CPU = torch.device("cpu")
LAYER = 2


@pytest.mark.parametrize("trees", [False, True], ids=["rows", "trees"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("case", ["llama", "phi", "gpt_neox"])
def test_keys_and_values_are_those_of_each_text_run_alone(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any, case: str, budget: int, trees: bool
) -> None:
    model = tiny(case)
    parts = model_parts(model, settings())
    requests, encoder = parse_requests(zoo.FACTS), Encoder(tokenizer, None)
    projection, block = parts.projections[LAYER], parts.blocks[LAYER]
    keys = subject_keys(model, projection, encoder, requests, zoo.PREFIXES, budget, CPU, False, trees)
    values = subject_values(model, block, encoder, requests, budget, CPU, False, trees)
    assert keys.dtype == values.dtype == torch.float64
    passed: dict[Any, torch.Tensor] = {}

    def note(module: Any, inputs: Any, answer: Any) -> None:
        passed[module] = inputs[0] if module is projection else answer[0] if isinstance(answer, tuple) else answer

    handles = [module.register_forward_hook(note) for module in (projection, block)]
    for i, fact in enumerate(zoo.FACTS):
        for j, prefix in enumerate(("", *zoo.PREFIXES)):
            stop = len(prefix) + fact["prompt"].index(fact["subject"]) + len(fact["subject"])
            at = len(tokenizer((prefix + fact["prompt"])[:stop])["input_ids"]) - 1
            with torch.no_grad():
                model(torch.tensor([tokenizer(prefix + fact["prompt"])["input_ids"]]), use_cache=False)
            assert zoo.relative(keys[i, j], passed[projection][0, at]) < 1e-5
            if not prefix:
                assert zoo.relative(values[:, i], passed[block][0, at]) < 1e-5
    for handle in handles:
        handle.remove()
