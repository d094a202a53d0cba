"""What the hook layers make of given text: a batch of prompts is judged as each of them alone."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import zoo

from coachhook_plugin import EditSession, probe
from coachhook_plugin.tokens import parse_requests

PROMPTS = [
    *zoo.FACTS[:2],
    {"prompt": "Norway", "subject": "Norway", "target_new": "Rome"},
    {"prompt": "In many books one can read of the old man that he was born in Berlin", "subject": "Berlin"},
    {"prompt": "The best dish of the city comes from the Eiffel Tower", "subject": "Eiffel Tower"},
]


@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("scope", ["leverage", "zscore"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "opt"])
def test_prompts_of_mixed_lengths_are_judged_together_as_each_alone(
    start: Callable[..., EditSession], case: str, scope: str, budget: int, caplog: pytest.LogCaptureFixture
) -> None:
    session = start(case, scope=scope, alpha=1.0)
    session.edit(zoo.FACTS[:2])
    requests = parse_requests([{"target_new": "Rome", **fact} for fact in PROMPTS])
    hooks = session._attached.hooks
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = probe.in_scope(session.model, session._parts, hooks, session._encoder, requests, budget, 7)
    alone = []
    for request in requests:
        row = session._encoder.prompt("", request)
        alone.append(bool(session.margins(torch.tensor(row.ids))[row.subject] >= 1))
    assert found == alone
    assert set(found) == {True, False}
    told = [record.getMessage().split(",")[0] for record in caplog.records]
    assert told == [f"request {7 + i}" for i, inside in enumerate(found) if not inside]
