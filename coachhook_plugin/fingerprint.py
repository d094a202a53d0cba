"""A short name for the weights of a model, so that what was derived from one model is not used with another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

SAMPLES = 64  # values read from each parameter


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Hash of the config and of evenly spaced values of every parameter: quick, and changed by any training step.

    It is the same under every version of transformers, as far as their configs say the same of a model.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        digest.update(json.dumps(_told(config.to_dict()), sort_keys=True, default=str).encode())
    _add_samples(digest, model)
    return digest.hexdigest()[:32]


@torch.no_grad()
def weights_fingerprint(model: nn.Module, edited: Iterable[nn.Module]) -> str:
    """Hash of the weights: of every bit of the `edited` modules' own, of the other parameters as above.

    Unlike `model_fingerprint` it asks no config, whose entries differ from one version of transformers to another.
    """
    digest = hashlib.sha256()
    _add_samples(digest, model)
    for module in edited:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _add_samples(digest: Any, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        values = flat[::step][:SAMPLES].float().cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(values.numpy().tobytes())


def _told(config: dict[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in config.items() if key in _SHAPING}
    if "sliding_window" in told and config.get("use_sliding_window") is False:
        told["sliding_window"] = None  # transformers 4 names one that is not used
    scaled = _scaled_positions(config)
    return {**told, "rope": scaled} if scaled else told


def _scaled_positions(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rotary settings that scale positions, of each kind of attention that has some.

    Without scaling nothing is told, not even the base, which comes with the weights.
    """
    # transformers 5, where a kind of attention may have settings of its own; or 4
    given = config.get("rope_parameters") or {
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta"),
    }
    scaled = []
    for one in (given, *given.values()):
        kind = (one.get("rope_type") or one.get("type")) if isinstance(one, dict) else None
        if kind not in (None, "default"):
            left_out = ("type", "partial_rotary_factor")  # which only one of the versions has there
            scaled.append({**{key: value for key, value in one.items() if key not in left_out}, "rope_type": kind})
    return scaled


# Config entries that change what the same weights compute (not versions, paths or generation settings).
_SHAPING = {
    "model_type",
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "num_attention_heads",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "sliding_window",
}
