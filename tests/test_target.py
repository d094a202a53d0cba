"""Target values: the batched optimisation finds what optimising one fact at a time with the whole model finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from coachhook_plugin import CoachHooKHparams, EditSession, tail, target
from coachhook_plugin.architectures import model_parts
from coachhook_plugin.target import Targets, optimise_targets
from coachhook_plugin.tokens import Encoder, parse_requests
from coachhook_plugin.trace import frozen

CPU = torch.device("cpu")
# The subject at the start (also: in the prompt's very first token), in the middle and at the end; a target of two
# tokens. All lie within reach of the narrowest sliding window, so that every target depends on its subject.
FACTS = [
    {"prompt": "People say that", "subject": "People", "target_new": "Seoul"},
    {"prompt": "The Eiffel Tower stands in the city of", "subject": "Eiffel Tower", "target_new": "Rome"},
    {"prompt": "People say that the best dish comes from Norway", "subject": "Norway", "target_new": "old Seoul"},
    {"prompt": "Ada Lovelace was born in", "subject": "Ada Lovelace", "target_new": "Berlin"},
]
LAST = FACTS[2]  # its subject ends the prompt


@pytest.fixture
def settings(text: Path) -> Callable[..., CoachHooKHparams]:
    """Two blocks above the edited ones, so that keys and values are kept for more than one."""
    return lambda **changed: zoo.hparams(text, **{"v_num_grad_steps": 6, **changed})


def found(one: Any, tokenizer: Any, facts: Sequence[dict[str, str]], hparams: CoachHooKHparams) -> Targets:
    requests = parse_requests(facts)
    encoder, prefixes = Encoder(tokenizer, None), hparams.context_prefixes
    assert prefixes is not None
    with frozen(one):
        last, parts = hparams.layers[-1], model_parts(one, hparams)
        return optimise_targets(one, parts, encoder, requests, prefixes, hparams, last, CPU, False)


def assert_as_plain(
    one: Any, tokenizer: Any, facts: Sequence[dict[str, str]], hparams: CoachHooKHparams, **plain: Any
) -> Targets:
    """The batch agrees with the oracle in values, number of steps and NLL; returns it."""
    together = found(one, tokenizer, facts, hparams)
    block, prefixes = model_parts(one, hparams).blocks[hparams.layers[-1]], hparams.context_prefixes
    assert prefixes is not None
    assert together.values.shape[1] == len(together.nll) == len(together.steps) == len(facts)
    for i, fact in enumerate(facts):
        value, steps, nll = zoo.plain_target(one, block, tokenizer, fact, prefixes, hparams, **plain)
        assert together.steps[i] == steps, fact
        assert together.nll[i] == pytest.approx(nll, rel=1e-3), fact
        assert zoo.relative(together.values[:, i], value) < 1e-4, fact
    return together


def start_values(one: Any, tokenizer: Any, facts: Sequence[dict[str, str]], hparams: CoachHooKHparams) -> torch.Tensor:
    """v0 (d, u): with one step nothing is added to it."""
    return found(one, tokenizer, facts, CoachHooKHparams(**{**hparams.to_dict(), "v_num_grad_steps": 1})).values


def test_the_first_fact_really_has_its_subject_in_the_first_token(tokenizer: Any) -> None:
    assert Encoder(tokenizer, None).prompt("", parse_requests(FACTS)[0]).subject == 0


@pytest.mark.parametrize("case", zoo.EVERY)
def test_each_family_gets_the_targets_of_the_plain_optimisation(
    case: str, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one, hparams = tiny(case), settings(v_num_grad_steps=6, context_prefixes=zoo.PREFIXES[:1])
    together = assert_as_plain(one, tokenizer, FACTS, hparams)
    moved = together.values - start_values(one, tokenizer, FACTS, hparams)
    assert moved.norm(dim=0).min() > 0.1  # v0 alone would not pass for an answer


@pytest.mark.parametrize("facts", [FACTS, FACTS[2:3]], ids=["four", "one"])
@pytest.mark.parametrize("family", zoo.EVERY_UNKNOWN)
def test_families_unknown_to_the_table_get_the_targets_of_the_plain_optimisation(
    family: str, facts: list[dict[str, str]], settings: Callable[..., Any], tokenizer: Any
) -> None:
    """With two prefixes one fact makes as many rows as there are heads."""
    one, names = zoo.unknown(family, len(tokenizer))
    prefixes = zoo.PREFIXES[:1] if len(facts) > 1 else zoo.PREFIXES
    assert_as_plain(one, tokenizer, facts, settings(v_num_grad_steps=4, context_prefixes=prefixes, **names))


@pytest.mark.parametrize(
    "changed",
    [
        {"kl_factor": 30.0},
        {"v_weight_decay": 100.0},
        {"v_lr": 0.05},
        {"clamp_norm_factor": 0.05},
        {"context_prefixes": []},
        {"layers": [2]},
        {"layers": [3]},  # nothing above the edited block
    ],
    ids=lambda changed: next(iter(changed)) + str(*changed.values()),
)
def test_every_setting_of_the_objective_is_obeyed(
    changed: dict[str, Any], tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    # Elsewhere than at the subject nothing changes in the last block; there only a subject at the end can be learned.
    facts = [LAST] if changed.get("layers") == [3] else FACTS
    one, usual = tiny(), settings(v_num_grad_steps=6)
    changed_values = assert_as_plain(one, tokenizer, facts, settings(v_num_grad_steps=6, **changed)).values
    assert zoo.relative(changed_values, found(one, tokenizer, facts, usual).values) > 1e-3


def test_the_offset_never_exceeds_its_share_of_the_value(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one, hparams = tiny(), settings(clamp_norm_factor=0.05)
    before = start_values(one, tokenizer, FACTS, hparams)
    moved = (found(one, tokenizer, FACTS, hparams).values - before).norm(dim=0)
    torch.testing.assert_close(moved, 0.05 * before.norm(dim=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2", "opt"])
def test_a_loss_layer_below_the_last_block_is_read_through_the_final_norm(
    case: str, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    # With one block in between, a sliding window of 4 hides the Eiffel Tower from the end of its prompt.
    facts = [fact for fact in FACTS if "Eiffel" not in fact["prompt"]]
    one, hparams = tiny(case), settings(v_loss_layer=2, v_num_grad_steps=6, context_prefixes=zoo.PREFIXES[:1])
    together = assert_as_plain(one, tokenizer, facts, hparams, loss_logits=_logits_after(one, case, 2))
    at_last = found(one, tokenizer, facts, settings(v_num_grad_steps=6, context_prefixes=zoo.PREFIXES[:1]))
    assert zoo.relative(together.values, at_last.values) > 1e-3


def test_the_edited_block_itself_can_be_the_loss_layer(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one, hparams = tiny(), settings(v_loss_layer=1, v_num_grad_steps=6)
    assert_as_plain(one, tokenizer, [LAST], hparams, loss_logits=_logits_after(one, "llama", 1))


def _logits_after(one: Any, case: str, block: int) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Logits as if the model ended after that block, by really ending it there."""
    owner, name = {
        "llama": lambda: (one.model, "layers"),
        "gemma2": lambda: (one.model, "layers"),
        "gpt2": lambda: (one.transformer, "h"),
        "opt": lambda: (one.model.decoder, "layers"),
    }[case]()

    def shortened(whole: Any, ids: torch.Tensor) -> torch.Tensor:
        blocks = getattr(owner, name)
        config, count = whole.config, len(blocks)
        setattr(owner, name, blocks[: block + 1])
        for key in ("num_hidden_layers", "n_layer"):
            if key in config.to_dict():
                setattr(config, key, block + 1)
        try:
            return whole(input_ids=ids, use_cache=False).logits
        finally:
            setattr(owner, name, blocks)
            for key in ("num_hidden_layers", "n_layer"):
                if key in config.to_dict():
                    setattr(config, key, count)

    return shortened


@pytest.mark.parametrize("kl_factor", [0.0625, 3.0])
def test_facts_that_are_learned_early_stop_early_and_the_others_go_on(
    kl_factor: float, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    # It is the whole loss that has to fall below the threshold, not the NLL alone.
    given = settings(v_loss_threshold=5.5, v_num_grad_steps=12, kl_factor=kl_factor)
    together = assert_as_plain(tiny(), tokenizer, FACTS, given)
    assert min(together.steps) < max(together.steps) == 12, "choose a threshold that separates the facts"
    if kl_factor == 3:
        assert any(nll < 5.5 and steps == 12 for nll, steps in zip(together.nll, together.steps, strict=True))


def test_a_fact_known_already_keeps_its_value(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one, hparams = tiny(), settings(v_loss_threshold=100.0)
    together = found(one, tokenizer, FACTS, hparams)
    assert together.steps == [1] * len(FACTS)
    assert torch.equal(together.values, start_values(one, tokenizer, FACTS, hparams))


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral-window-4", "opt"])
def test_memory_budget_and_batch_mates_change_no_target(
    case: str,
    tiny: Callable[..., Any],
    settings: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, batches = tiny(case), []

    def counting(*args: Any, **kwargs: Any) -> tail.Tail:
        batches.append(args[-1])
        return tail.cut(*args, **kwargs)

    monkeypatch.setattr(target, "cut", counting)
    whole = found(one, tokenizer, FACTS, settings())
    assert len(batches) == 1
    pieces = found(one, tokenizer, FACTS, settings(target_tokens=1))
    assert len(batches) == 1 + len(FACTS)
    turned = found(one, tokenizer, FACTS[::-1], settings())
    alone = found(one, tokenizer, FACTS[1:2], settings())
    assert zoo.relative(pieces.values, whole.values) < 1e-5
    assert zoo.relative(turned.values.flip(1), whole.values) < 1e-5
    assert zoo.relative(alone.values[:, 0], whole.values[:, 1]) < 1e-5
    assert pieces.steps == whole.steps == turned.steps[::-1]


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("scope", ["leverage", "zscore"])
def test_later_batches_take_the_earlier_edits_into_account(
    case: str, scope: str, start: Callable[..., EditSession], settings: Callable[..., Any], tokenizer: Any
) -> None:
    session = start(case, mom2_update_weight=0.1, scope=scope, alpha=0.5, scope_budget=0.25)
    base = found(session.model, tokenizer, FACTS, settings()).values
    session.edit(FACTS[:1])
    together = assert_as_plain(session.model, tokenizer, FACTS, settings())
    assert zoo.relative(together.values, base) > 1e-3, "the first batch is not in force here"


def test_an_objective_that_is_not_finite_is_reported_with_its_request(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one = tiny()
    unseen = next(
        iter(set(tokenizer(FACTS[1]["prompt"])["input_ids"]) - set(tokenizer(FACTS[0]["prompt"])["input_ids"]))
    )
    with torch.no_grad():
        one.get_input_embeddings().weight[unseen] = torch.nan
    with pytest.raises(ValueError, match=r"request 1 \('The Eiffel"):
        found(one, tokenizer, FACTS[:2], settings(context_prefixes=[]))


def test_a_model_in_training_is_left_without_gradients_and_as_it_was(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one = tiny().train()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    found(one, tokenizer, FACTS, settings())
    assert one.training
    assert all(p.grad is None and p.requires_grad for p in one.parameters())
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
