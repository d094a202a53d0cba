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
    """Hash of the config and of evenly spaced values of every parameter: quick, and changed by any training step."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        told = {key: value for key, value in config.to_dict().items() if key in _SHAPING}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    _add_samples(digest, model)
    return digest.hexdigest()[:32]


@torch.no_grad()
def weights_fingerprint(model: nn.Module, edited: Iterable[nn.Module]) -> str:
    """Hash of the weights: of every bit of the `edited` modules' own, of the other parameters as above.

    Unlike `model_fingerprint` it is the same under every version of transformers, whose configs differ.
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


# Config entries that change what the same weights compute (not versions, paths or generation settings).
_SHAPING = {
    "model_type",
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_scaling",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
}
