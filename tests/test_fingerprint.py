"""Names of models: others for what computes otherwise, the same under every version of transformers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from coachhook_plugin.fingerprint import model_fingerprint

LINEAR = {"rope_type": "linear", "factor": 4.0}


def of_config(**config: Any) -> str:
    """The name of a model without weights."""
    model = nn.Module()
    model.config = SimpleNamespace(to_dict=lambda: {"model_type": "llama", **config})  # type: ignore[assignment]
    return model_fingerprint(model)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (
            "llama",
            [
                {},
                {"rope_theta": 500.0},
                {"rope_scaling": LINEAR},
                {"rope_scaling": {**LINEAR, "factor": 2.0}},
                {"rope_scaling": LINEAR, "rope_theta": 500.0},
                {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            ],
        ),
        ("gemma2", [{}, {"query_pre_attn_scalar": 16}]),
        ("mistral", [{}, {"sliding_window": 4}]),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_statistics_of_the_same_weights_with_other_settings_are_not_taken_for_each_other(
    case: str, changes: list[dict[str, Any]], tiny: Callable[..., Any]
) -> None:
    assert len({model_fingerprint(tiny(case, **deepcopy(changed))) for changed in changes}) == len(changes)


@pytest.mark.parametrize(
    ("before", "since"),  # transformers 5
    [
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        (
            {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        ),
        ({"rope_theta": 5e2, "rope_scaling": LINEAR}, {"rope_parameters": {**LINEAR, "rope_theta": 5e2}}),
        (
            {"rope_theta": 5e2, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_parameters": {**LINEAR, "type": "linear", "rope_theta": 5e2}},
        ),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {**LINEAR, "rope_theta": 1e6},
                }
            },
        ),
        (
            {"sliding_window": 4096, "use_sliding_window": False},
            {"sliding_window": None, "use_sliding_window": False},
        ),
    ],
    ids=["plain", "partial", "scaled", "scaled, old name", "two kinds of attention", "unused window"],
)
def test_statistics_are_found_again_after_a_change_of_the_library(
    before: dict[str, Any], since: dict[str, Any]
) -> None:
    assert of_config(**before) == of_config(**since)
