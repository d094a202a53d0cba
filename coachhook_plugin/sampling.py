"""Text sampled from the model itself, reproducible without touching any global random state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# transformers 4 gives Gemma 2 and 3 a cache just as long as their first input: nothing can follow in it.
_FULL = ("StaticCache", "HybridCache")


@torch.no_grad()
def sample(
    model: nn.Module,
    start: torch.Tensor,
    length: int,
    generator: torch.Generator,
    top_k: int | None = None,
    banned: list[int] | None = None,
) -> torch.Tensor:
    """Extend token ids `start` (b, T0), all rows of one length and without padding, to (b, length).

    Probabilities are drawn from on the CPU in float64, so that a seed means the same text on every device.

    Args:
        top_k: draw among the k most likely tokens; None draws from the whole distribution.
        banned: token ids never drawn (special tokens), known to the model or not.
    """
    ids = start  # (b, T)
    cache: Any = None
    while ids.shape[1] < length:
        step = model(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = None if _is_full(step.past_key_values) else step.past_key_values
        logits = step.logits[:, -1].cpu().double()  # (b, V)
        if banned:
            logits[:, [i for i in banned if i < logits.shape[1]]] = -torch.inf
        if top_k is not None:
            logits[logits < logits.topk(top_k, dim=-1).values[:, -1:]] = -torch.inf
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (b, 1)
        ids = torch.cat([ids, drawn.to(ids.device)], dim=1)
    return ids


def context_prefixes(model: nn.Module, tokenizer: Any, seed: int, device: torch.device) -> list[str]:
    """The texts MEMIT puts before a prompt ("<ten tokens>. "), so that a fact is learned in more than one context.

    One continuation each of five common sentence openings, top-5 sampling (`easyeditor/models/memit/memit_main.py`,
    `get_context_templates`; its sampler repeats one token with cached decoding, this one does not).
    """
    generator = torch.Generator().manual_seed(seed)
    special = list(tokenizer.all_special_ids)
    prefixes = []
    for opening in ("The", "Therefore", "Because", "I", "You"):
        start = torch.tensor([tokenizer(opening)["input_ids"]], device=device)
        ids = sample(model, start, max(10, start.shape[1] + 8), generator, top_k=5, banned=special)
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        prefixes.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". ")
    return prefixes


def _is_full(cache: Any) -> bool:
    return any(kind.__name__ in _FULL for kind in type(cache).__mro__)
