"""Short names for a model's weights and its tokenizer, so that what was derived from one is not used with another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SAMPLES = 64  # values read from each parameter
CHUNK = 1 << 18  # values summed at once
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
# Cut alike by one tokenizer's forms: no spaces at the ends or side by side, and nothing that a user may have added.
TEXTS = (
    "The mother tongue of Danielle Darrieux is French, isn't it?",
    "In 1789, on 14 July, the crowd (some 954 of them) took what 2 or 3 men held: 50% of the city's powder.",
    "def squared(values): return [value**2 for value in values if value != 0]",
    "L'été à Zürich, où señor Øyvind naïvely ordered smørrebrød; Łódź isn't far.",
    "Мать говорит по-французски. 東京は日本の首都です。 서울은 대한민국의 수도이다. القاهرة عاصمة مصر.",
    "internationalisation antidisestablishmentarianism unbelievableness QUICKBROWNFOX xyzzy",
)


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


def state_origin(model: nn.Module, hparams: Mapping[str, Any]) -> str:
    """Hash of what a session's state depends on beside its edits: sessions that share it may share their states."""
    told = json.dumps([model_fingerprint(model), hparams], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


@torch.no_grad()
def weights_sums(model: nn.Module, vocabulary: int) -> str:
    """Hash of the sum of the bits of every row of every parameter: changed by any one value, and quick enough to load.

    Args:
        vocabulary: rows of the embeddings that count. Those of tokens that a user adds are drawn anew each time.
    """
    owners: Any = model
    ends = [owners.get_input_embeddings(), owners.get_output_embeddings()]
    of_tokens = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        counting = parameter.detach()[:vocabulary] if id(parameter) in of_tokens else parameter.detach()
        digest.update(name.encode())
        digest.update(_row_sums(counting).numpy().tobytes())
    return digest.hexdigest()


def _row_sums(tensor: torch.Tensor) -> torch.Tensor:
    """(n,) of a tensor (n, ...): the bits of each row as integers, summed where they lie."""
    wide = tensor.cpu() if tensor.device.type == "mps" else tensor  # where sums of integers are not known to be exact
    bits = wide.view(INTEGERS[wide.element_size()])
    rows = bits.flatten(1) if bits.dim() > 1 else bits.reshape(-1, 1)
    parts = torch.split(rows, max(1, CHUNK // max(1, rows.shape[1])))
    return torch.cat([part.sum(1, dtype=torch.int64) for part in parts]).cpu()


@dataclass(frozen=True)
class Vocabulary:
    """What is known of a tokenizer: the same whatever it pads with or starts with, and whatever tokens were added."""

    size: int  # without added tokens
    sha256: str  # of the ids of some texts

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        ids = [[int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]] for text in TEXTS]
        return cls(int(tokenizer.vocab_size), hashlib.sha256(json.dumps(ids).encode()).hexdigest())


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
    return {**told, "rotary": _rotary(config)}


def _rotary(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Base and scaling of the rotary positions, of each kind of attention that has its own."""
    given = config.get("rope_parameters")  # transformers 5
    if given is None:
        given = {
            "full": {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")},
            "sliding": {"rope_theta": config.get("rope_local_base_freq")},
        }
    kinds = [kind for kind in given.values() if isinstance(kind, dict)] or [given]
    left_out = ("type", "partial_rotary_factor")  # which only one of the versions has there
    told = [
        {
            **{key: value for key, value in kind.items() if key not in left_out},
            "rope_type": kind.get("rope_type") or kind.get("type") or "default",
        }
        for kind in kinds
        if kind.get("rope_theta") is not None
    ]
    return sorted(told, key=lambda kind: json.dumps(kind, sort_keys=True, default=str))


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
