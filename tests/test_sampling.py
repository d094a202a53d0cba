"""Text sampled from the model: reproducible, from the whole distribution, and without touching anybody's dice."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from coachhook_plugin.sampling import context_prefixes, sample

CPU = torch.device("cpu")
CACHED = pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox", "mistral-window-4", "gemma2", "gemma3", "opt"])


def dice(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def opening(tokenizer: Any, text: str = "The mother", rows: int = 3) -> torch.Tensor:
    return torch.tensor([tokenizer(text)["input_ids"]] * rows)


@CACHED
def test_cached_decoding_draws_what_full_passes_draw(case: str, tiny: Callable[..., Any], tokenizer: Any) -> None:
    one, generator = tiny(case), dice()
    ids = opening(tokenizer)
    with torch.no_grad():
        while ids.shape[1] < 16:
            probabilities = one(input_ids=ids, use_cache=False).logits[:, -1].double().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    assert torch.equal(sample(one, opening(tokenizer), 16, dice()), ids)
    assert len({tuple(row) for row in ids.tolist()}) == 3  # the rows are drawn apart


def test_another_seed_gives_another_text(tiny: Callable[..., Any], tokenizer: Any) -> None:
    one, start = tiny(), opening(tokenizer)
    assert torch.equal(sample(one, start, 12, dice(3)), sample(one, start, 12, dice(3)))
    assert not torch.equal(sample(one, start, 12, dice(3)), sample(one, start, 12, dice(4)))


def test_the_callers_random_generators_stay_where_they_were(tiny: Callable[..., Any], tokenizer: Any) -> None:
    one = tiny()

    def states() -> tuple[Any, ...]:
        arrays = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 - the global one
        return random.getstate(), arrays["pos"], arrays["key"].tobytes(), torch.get_rng_state().numpy().tobytes()

    before = states()
    context_prefixes(one, tokenizer, 0, CPU)
    sample(one, opening(tokenizer), 12, dice())
    assert states() == before
    torch.manual_seed(1)
    first = context_prefixes(one, tokenizer, 0, CPU)
    torch.manual_seed(2)
    assert context_prefixes(one, tokenizer, 0, CPU) == first


class Fixed(torch.nn.Module):
    """A model whose next-token probabilities never change."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1), past_key_values=None)


def frequencies(**given: Any) -> torch.Tensor:
    ids = sample(Fixed([0.5, 0.25, 0.15, 0.1]), torch.zeros(500, 1, dtype=torch.long), 21, dice(), **given)
    return torch.bincount(ids[:, 1:].flatten(), minlength=4) / 10_000


def test_tokens_are_drawn_as_often_as_the_model_finds_them_likely() -> None:
    torch.testing.assert_close(frequencies(), torch.tensor([0.5, 0.25, 0.15, 0.1]), rtol=0, atol=0.025)


def test_top_k_draws_among_the_likeliest_only() -> None:
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0]), rtol=0, atol=0.025)


def test_special_tokens_are_never_drawn() -> None:
    found = frequencies(banned=[0, 3])
    torch.testing.assert_close(found, torch.tensor([0, 0.625, 0.375, 0]), rtol=0, atol=0.025)
    assert found[0] == found[3] == 0


def test_a_special_token_that_the_model_does_not_know_is_no_obstacle() -> None:
    assert torch.equal(frequencies(banned=[0, 4]), frequencies(banned=[0]))


def test_braces_and_line_breaks_of_the_model_do_not_reach_a_context_prefix(tokenizer: Any) -> None:
    wanted = [tokenizer.convert_tokens_to_ids(token) for token in ("{", "}", "Ċ", "x")]
    probabilities = torch.full((len(tokenizer),), 1e-9)
    probabilities[wanted] = 0.25
    prefixes = context_prefixes(Fixed(probabilities.tolist()), tokenizer, 0, CPU)
    assert any("x" in prefix for prefix in prefixes)
    assert not set("{}\n") & set("".join(prefixes))
    for prefix, word in zip(prefixes, ("The", "Therefore", "Because", "I", "You"), strict=True):
        assert prefix.startswith(word)
        assert prefix.endswith(". ")


def test_another_seed_gives_other_context_prefixes(tiny: Callable[..., Any], tokenizer: Any) -> None:
    one = tiny()
    first = context_prefixes(one, tokenizer, 0, CPU)
    assert len(set(first)) == 5
    assert context_prefixes(one, tokenizer, 1, CPU) != first
