"""What a session begins with: memories of pre-training alone, and a scope that nothing has opened yet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import statistics
from .architectures import ModelParts, key_size, weight_device
from .hparams import CoachHooKHparams
from .memory import KeyMemory
from .scope import LeverageScope, Scope, Thresholds, ZScoreScope
from .state import LayerState, Tensors
from .text import TextSource, text_source


def beginning(
    model: nn.Module, tokenizer: Any, parts: ModelParts, hparams: CoachHooKHparams, progress: bool
) -> tuple[dict[int, LayerState], Scope | None]:
    """The edited layers before any edit, and the scope (None without hook layers), from the key statistics.

    The model must be frozen and without hook layers in force.
    """
    device = next(model.parameters()).device
    # Read or written once, and only if somebody asks for it.
    text = functools.cache(lambda: text_source(model, tokenizer, hparams, key_size(parts), device))
    found = statistics.key_statistics(model, parts, hparams, text, progress)
    layers = {}
    for layer, projection in parts.projections.items():
        covariance = _moved(found[layer].covariance(), projection)
        layers[layer] = LayerState(
            delta=torch.zeros(parts.hidden_size, len(covariance), device=covariance.device),
            memory=KeyMemory.of_covariance(covariance, hparams.mom2_update_weight, hparams.memory_device),
        )
    return layers, _new_scope(model, parts, hparams, found, text) if hparams.use_hooks else None


def scope_of_constants(
    model: nn.Module, parts: ModelParts, hparams: CoachHooKHparams, constants: Tensors
) -> Scope | None:
    """The scope that has these constants (see `Scope.constants`); without any, only its gates can be used."""
    if not hparams.use_hooks:
        return None
    if hparams.scope == "zscore":
        return _zscore(model, hparams)
    layers = hparams.edited_layers
    first = weight_device(parts.projections[layers[0]])
    constants = {name: tensor.to(first) for name, tensor in constants.items()}
    return LeverageScope.of_constants(layers, constants, hparams.scope_budget, hparams.scope_ridge, hparams.seed)


def _new_scope(
    model: nn.Module,
    parts: ModelParts,
    hparams: CoachHooKHparams,
    found: dict[int, statistics.KeyStatistics],
    text: Callable[[], TextSource],
) -> Scope:
    if hparams.scope == "zscore":
        return _zscore(model, hparams)
    layers = hparams.edited_layers
    first = layers[0]
    sample = statistics.pre_training_keys(model, parts, first, text())
    moments = _moved(found[first].covariance().diagonal(), parts.projections[first])
    return LeverageScope(layers, moments, sample, hparams.scope_budget, hparams.scope_ridge, hparams.seed)


def _zscore(model: nn.Module, hparams: CoachHooKHparams) -> ZScoreScope:
    start = Thresholds(hparams.alpha, hparams.short_prompt_ratio)
    return ZScoreScope(model, hparams.edited_layers, start, hparams.dynamic_alpha)


def _moved(matrix: torch.Tensor, projection: nn.Module) -> torch.Tensor:
    """A float64 matrix where the projection's weight is, as wide as that device has it."""
    device = weight_device(projection)
    return (matrix.float() if device.type == "mps" else matrix).to(device).contiguous()
