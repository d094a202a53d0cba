"""Where the parts of a causal language model are: one row per model family, and nothing else names a family.

A family this table lacks can still be edited by giving the module names in the hyperparameters, as the toolkit does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from .hparams import CoachHooKHparams


@dataclass(frozen=True)
class Architecture:
    """Module paths; `{}` stands for the number of a block."""

    block: str
    projection: str  # MLP output projection: the linear map W0 (d x m) whose input is the key
    final_norm: str
    head: str


def _llama(projection: str = "down_proj", final_norm: str = "norm") -> Architecture:
    return Architecture(
        block="model.layers.{}",
        projection=f"model.layers.{{}}.mlp.{projection}",
        final_norm=f"model.{final_norm}",
        head="lm_head",
    )


def _gpt2(projection: str) -> Architecture:
    return Architecture(
        block="transformer.h.{}",
        projection=f"transformer.h.{{}}.mlp.{projection}",
        final_norm="transformer.ln_f",
        head="lm_head",
    )


# Keys are `model.config.model_type`.
FAMILIES: dict[str, Architecture] = {
    "gpt2": _gpt2("c_proj"),
    "gptj": _gpt2("fc_out"),
    "gpt_neox": Architecture(
        block="gpt_neox.layers.{}",
        projection="gpt_neox.layers.{}.mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
    ),
    "opt": Architecture(
        block="model.decoder.layers.{}",
        projection="model.decoder.layers.{}.fc2",
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
    ),
    "phi": _llama("fc2", "final_layernorm"),
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "gemma": _llama(),
    "gemma2": _llama(),
    "gemma3_text": _llama(),
    "phi3": _llama(),
    "olmo": _llama(),
    "olmo2": _llama(),
    "smollm3": _llama(),
    "granite": _llama(),
}


@dataclass(frozen=True)
class ModelParts:
    """The modules that editing touches or reads."""

    blocks: list[nn.Module]
    projections: dict[int, nn.Module]  # by edited layer
    final_norm: nn.Module
    head: nn.Module
    names: Architecture
    logit_cap: float | None  # Gemma 2: cap * tanh(logits / cap)
    logit_divisor: float  # Granite

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., V) from the last block's output (..., d), as the whole model gives them."""
        weight = cast(torch.Tensor, self.head.weight)  # a linear layer, or the embedding it is tied to
        bias = cast("torch.Tensor | None", getattr(self.head, "bias", None))
        logits = F.linear(self.final_norm(hidden).to(weight.device), weight, bias) / self.logit_divisor
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

    @property
    def hidden_size(self) -> int:
        """d: the length of a value."""
        return weight_shape(next(iter(self.projections.values())))[0]


def model_parts(model: nn.Module, hparams: CoachHooKHparams) -> ModelParts:
    """Find the parts of `model`, by the hyperparameters' module names where given, else by its family.

    Raises:
        KeyError: unknown family and not every module named.
        ValueError: a name that is no module of this model, or an edited layer out of range.
    """
    names = _names(model, hparams)
    blocks = _blocks(model, names.block)
    out_of_range = [layer for layer in hparams.layers if layer >= len(blocks)]
    if out_of_range:
        raise ValueError(f"layers: {out_of_range} out of range; this model has blocks 0 to {len(blocks) - 1}")
    if hparams.v_loss_layer is not None and not hparams.layers[-1] <= hparams.v_loss_layer < len(blocks):
        raise ValueError(
            f"v_loss_layer is {hparams.v_loss_layer}; expected a block from the last edited layer "
            f"({hparams.layers[-1]}) to {len(blocks) - 1}"
        )
    projections = {layer: _module(model, names.projection.format(layer)) for layer in hparams.edited_layers}
    for layer, projection in projections.items():
        if not _is_plain(projection):
            raise ValueError(
                f"{names.projection.format(layer)} is a {type(projection).__name__}; a plain linear layer is needed"
                " (quantised weights cannot be edited: load the model in 16 or 32 bits)"
            )
    config = getattr(model, "config", None)
    return ModelParts(
        blocks=blocks,
        projections=projections,
        final_norm=_module(model, names.final_norm),
        head=_module(model, names.head),
        names=names,
        logit_cap=getattr(config, "final_logit_softcapping", None),
        logit_divisor=getattr(config, "logits_scaling", None) or 1.0,
    )


def _is_plain(projection: nn.Module) -> bool:
    """Whether it holds its weight as numbers of 16 bits or more; quantised layers are linear ones by name as well."""
    if isinstance(projection, nn.Linear):
        shape: tuple[Any, Any] = (projection.out_features, projection.in_features)
    elif is_transposed(projection):
        shape = (projection.nx, projection.nf)
    else:
        return False
    weight = cast(torch.Tensor, projection.weight)
    return weight.is_floating_point() and weight.element_size() > 1 and tuple(weight.shape) == shape


def weight_device(projection: nn.Module) -> torch.device:
    """Where the weight of an output projection is."""
    weight = projection.weight
    assert isinstance(weight, torch.Tensor)
    return weight.device


def weight_shape(projection: nn.Module) -> tuple[int, int]:
    """(d, m) of a projection, whichever way round its weight is stored."""
    weight = cast(torch.Tensor, projection.weight)
    rows, columns = weight.shape
    return (columns, rows) if is_transposed(projection) else (rows, columns)


def key_size(parts: ModelParts) -> int:
    """m: the length of a key, the largest of all edited layers."""
    return max(weight_shape(projection)[1] for projection in parts.projections.values())


def is_transposed(projection: nn.Module) -> bool:
    """GPT-2's Conv1D stores its weight as (m, d)."""
    from transformers.pytorch_utils import Conv1D  # slow to import; with a model it is there

    return isinstance(projection, Conv1D)


def vocabulary_size(model: nn.Module) -> int:
    """Tokens that the model has an embedding of; some of a tokenizer's may lie beyond."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def context_length(model: nn.Module) -> int | None:
    """Longest input the model takes, in tokens, where its config says."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _names(model: nn.Module, hparams: CoachHooKHparams) -> Architecture:
    given = {
        "block": hparams.layer_module_tmp,
        "projection": hparams.rewrite_module_tmp,
        "final_norm": hparams.ln_f_module,
        "head": hparams.lm_head_module,
    }
    family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    row = FAMILIES.get(family)
    if row is None and not all(given.values()):
        raise KeyError(
            f"unknown model family {family!r} (known: {', '.join(sorted(FAMILIES))}); name its modules with "
            "layer_module_tmp, rewrite_module_tmp, ln_f_module and lm_head_module"
        )
    return Architecture(
        **{f.name: given[f.name] or (getattr(row, f.name) if row else "") for f in fields(Architecture)}
    )


def _blocks(model: nn.Module, template: str) -> list[nn.Module]:
    parent = _module(model, template.removesuffix(".{}"))
    if not template.endswith(".{}") or not isinstance(parent, nn.ModuleList | nn.Sequential):
        raise ValueError(f"layer_module_tmp is {template!r}; expected the list of blocks, such as 'model.layers.{{}}'")
    return list(parent)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {path!r}; correct its name in the YAML") from None
