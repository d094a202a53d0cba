"""Generation from an edited model: however it is decoded, it says what whole passes over the same text would say."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
import zoo
from conftest import NAMES, SENTENCES, lessons
from plain import answered
from transformers import GenerationMixin

from coachhook_plugin import EditSession

Edited = Callable[..., EditSession]

CASES = ["llama", "gpt2", "mistral-window-4"]
PROJECTION = {"gpt2": "transformer.h.{}.mlp.c_proj"}

# Sentences that the taught models go on with a name and a place; every name is edited behind the first of them.
OPENINGS = [sentence.removesuffix(" {}") for sentence in SENTENCES]
EDITS = lessons(1)[::3]
TEXTS = [
    EDITS[0]["prompt"],  # a subject at the very end
    f"{EDITS[3]['prompt']} Rome. {EDITS[1]['prompt'][:30]}",  # and in the middle
    OPENINGS[0],  # none yet
    "People say",
]

CACHES: dict[str, dict[str, Any]] = {
    "none": {"use_cache": False},
    "dynamic": {"use_cache": True},
    "static": {"cache_implementation": "static"},
}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 20}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": SAMPLED,
    "sampled beams": {**SAMPLED, "num_beams": 2},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}
# What later versions of transformers have moved out.
MOVED: dict[str, tuple[str, dict[str, Any]]] = {
    "groups of beams": ("_group_beam_search", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
    "contrasted layers": ("_dola_decoding", {"dola_layers": "high", "repetition_penalty": 1.2}),
}
WAYS |= {name: given for name, (method, given) in MOVED.items() if hasattr(GenerationMixin, method)}


@pytest.fixture(scope="module")
def edited(taught: Callable[..., EditSession]) -> Edited:
    """`edited("gpt2")`: a session with `EDITS`, or the one about a subject; shared, so no test may change it."""

    @functools.cache
    def made(case: str, subject: str | None = None, **changed: Any) -> EditSession:
        session = taught(case, scope_budget=0.01, **changed)
        session.edit([fact for fact in EDITS if subject in (None, fact["subject"])])
        return session

    return made


def first_projection(session: EditSession, case: str) -> Any:
    name = PROJECTION.get(case, "model.layers.{}.mlp.down_proj")
    return session.model.get_submodule(name.format(session.hparams.layers[0]))


def padded(session: EditSession, texts: Sequence[str]) -> Any:
    """Token ids and mask of a batch, padded on the left."""
    tokenizer = copy.deepcopy(session.tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)


def generated(session: EditSession, *texts: str, model: Any = None, **given: Any) -> list[list[int]]:
    """The new tokens for each text, all of them in one batch."""
    inputs = padded(session, texts)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **given}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = (model or session.model).generate(**inputs, **settings)
    return made[:, inputs["input_ids"].shape[1] :].tolist()


def spoken(session: EditSession, *texts: str, **given: Any) -> list[str]:
    return session.tokenizer.batch_decode(generated(session, *texts, **given))


# --- with and without a cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_said_does_not_depend_on_the_cache(edited: Edited, case: str, way: str) -> None:
    session = edited(case)
    for texts in (TEXTS[2:3], TEXTS):
        found = {name: generated(session, *texts, **WAYS[way], **cache) for name, cache in CACHES.items()}
        assert found["dynamic"] == found["none"], texts
        assert found["static"] == found["none"], texts
    with session.disabled():
        assert generated(session, *TEXTS, **WAYS[way]) != found["none"]


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", CASES)
def test_every_step_of_a_generation_is_that_of_a_whole_pass(edited: Edited, case: str, cache: str) -> None:
    session = edited(case)
    generating = 0
    for text in TEXTS:
        inputs = padded(session, [text])
        made = session.model.generate(
            **inputs,
            **CACHES[cache],
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        start = inputs["input_ids"].shape[1]
        whole = session.model(input_ids=made.sequences, use_cache=False).logits[0, start - 1 : -1]
        steps = torch.cat(made.logits)
        assert zoo.relative(steps, whole) < 1e-4
        assert torch.equal(made.sequences[0, start:], whole.argmax(-1))
        generating += int((session.margins(made.sequences[0])[start:] >= 1).sum())
    assert generating, "no edited subject among the generated tokens"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", ["greedy", "beams", "penalised"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_mixed_lengths_says_what_each_prompt_says_alone(
    edited: Edited, case: str, way: str, cache: str
) -> None:
    session = edited(case)
    stop = session.tokenizer(".")["input_ids"]
    assert len(stop) == 1
    given = {**WAYS[way], **CACHES[cache]}
    if way != "beams":  # which go on a little past their end, as long as a batch mate does
        given["eos_token_id"] = stop[0]
    each = WAYS[way].get("num_return_sequences", 1)
    together = generated(session, *TEXTS, **given)
    for b, text in enumerate(TEXTS):
        for row, alone in zip(together[each * b : each * (b + 1)], generated(session, text, **given), strict=True):
            assert row[: len(alone)] == alone
            assert set(row[len(alone) :]) <= {0, stop[0]}
    if "eos_token_id" in given:
        assert len({row.index(stop[0]) if stop[0] in row else None for row in together}) > 1, "all end at once"


@pytest.mark.skipif(not hasattr(GenerationMixin, "_contrastive_search"), reason="transformers has moved it out")
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_contrastive_search_says_the_same_whether_candidates_are_tried_together_or_in_turn(
    edited: Edited, case: str
) -> None:
    session = edited(case)
    given = {"penalty_alpha": 0.6, "top_k": 3}
    together = generated(session, *TEXTS, **given)
    assert [generated(session, text, **given)[0] for text in TEXTS] == together
    assert [generated(session, text, **given, low_memory=True)[0] for text in TEXTS] == together
    with session.disabled():
        assert generated(session, *TEXTS, **given) != together


# --- drafted by another ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", ["the base model", "a copy", "another model", "its lower layers", "the prompt"])
@pytest.mark.parametrize("case", ["llama", "gpt2"])  # a sliding window cannot take drafts back
def test_who_drafts_the_tokens_does_not_change_what_is_said(
    edited: Edited, tiny: Callable[..., Any], case: str, drafts: str
) -> None:
    session = edited(case)
    given: dict[str, Any] = {}
    if drafts == "the base model":
        given["assistant_model"] = base = copy.deepcopy(session.model)
        EditSession.of(base).detach()  # type: ignore[union-attr]
    elif drafts == "a copy":
        given["assistant_model"] = copy.deepcopy(session.model)
    elif drafts == "another model":
        given["assistant_model"] = tiny("llama" if case == "gpt2" else "gpt2", seed=1)
    elif drafts == "its lower layers":
        if case == "gpt2":
            pytest.skip("not every GPT-2 of transformers can stop early")
        given["assistant_early_exit"] = 1  # below the last edited layer
    else:
        given["prompt_lookup_num_tokens"] = 4
    drafted = opened = 0
    for text in [*TEXTS, f"{TEXTS[1]} {EDITS[4]['prompt']} {TEXTS[1]}"]:
        alone = generated(session, text)
        with answered(first_projection(session, case)) as passes:
            (found,) = generated(session, text, **given)
        assert found[:12] == alone[0], text  # with drafts there may be one token more than asked for
        drafted += sum(open_.shape[1] > 1 for open_ in passes[1:])
        opened += sum(int(open_.sum()) for open_ in passes[1:])
        assert generated(session, text) == alone  # nothing is left behind
    assert drafted
    assert opened, "no edited subject among the drafts"


# --- other doors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_talk_that_goes_on_from_its_cache_is_as_one_from_its_start(edited: Edited, case: str) -> None:
    session = edited(case)
    model, tokenizer = session.model, session.tokenizer
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids, past = torch.empty(1, 0, dtype=torch.long), None
    for text in [OPENINGS[0], f". {EDITS[2]['prompt']}", f" and {OPENINGS[1]}"]:
        ids = torch.cat([ids, torch.tensor([tokenizer(text)["input_ids"]])], dim=1)
        mask = torch.ones_like(ids)
        cached = {} if past is None else {"past_key_values": past}
        made = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **cached, **given)
        fresh = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **given)
        assert torch.equal(made.sequences, fresh)
        ids, past = made.sequences, made.past_key_values


@pytest.mark.parametrize("case", CASES)
def test_prompts_given_as_embeddings_are_answered_as_tokens_are(edited: Edited, case: str) -> None:
    session = edited(case)
    inputs = padded(session, TEXTS)
    with torch.no_grad():
        embedded = session.model.get_input_embeddings()(inputs["input_ids"])
    for cache in ({"use_cache": True}, {"cache_implementation": "static"}):
        made = session.model.generate(
            inputs_embeds=embedded,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            **cache,
        )
        assert made.tolist() == generated(session, *TEXTS)


def test_a_compiled_model_generates_as_the_model_itself(edited: Edited) -> None:
    session = edited("llama")
    twin = copy.deepcopy(session.model)
    twin.compile(backend="eager")
    given = {"cache_implementation": "static", "max_new_tokens": 5}
    expected = generated(session, *TEXTS, **given)
    assert generated(session, *TEXTS, model=twin, **given) == expected
    with session.disabled():
        assert generated(session, *TEXTS, **given) != expected


# --- subjects that come up on the way --------------------------------------------------------------------------------


def told_first(said: str, shift: int) -> bool:
    """Whether a continuation of the first opening starts with a name and its place, of `lessons(shift)`."""
    return any(f"{OPENINGS[0]}{said}".startswith(f"{of['prompt']} {of['target_new']}") for of in lessons(shift)[::3])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", CASES)
def test_a_subject_that_the_model_itself_brings_up_gets_its_new_answer(edited: Edited, case: str, cache: str) -> None:
    session = edited(case)
    with session.disabled():
        (before,) = spoken(session, OPENINGS[0], **CACHES[cache])
    (after,) = spoken(session, OPENINGS[0], **CACHES[cache])
    assert told_first(before, 0), before
    assert told_first(after, 1), after
    name = next(name for name in NAMES if before.startswith(f" {name}"))
    assert after.startswith(f" {name}")


@pytest.mark.parametrize("case", CASES)
def test_the_paper_rule_leaves_a_subject_that_the_model_brings_up_to_the_base_model(edited: Edited, case: str) -> None:
    session = edited(case)
    with session.disabled():
        (before,) = spoken(session, OPENINGS[0])
    fact = next(fact for fact in EDITS if before.startswith(f" {fact['subject']}"))
    for scope, shift in (("leverage", 1), ("zscore", 0)):
        # So high that alpha comes to lie at the edited prompt's own z, above that of the opening.
        session = edited(case, fact["subject"], scope=scope, alpha=9.0, short_prompt_ratio=1.0)
        (asked,), (said,) = spoken(session, fact["prompt"]), spoken(session, OPENINGS[0])
        assert asked.startswith(f" {fact['target_new']}")
        assert told_first(said, shift), said


@pytest.mark.parametrize("scope", ["leverage", "zscore"])
@pytest.mark.parametrize("way", ["greedy", "beams", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_a_subject_put_into_the_models_mouth_opens_the_causal_scope_alone(
    edited: Edited, case: str, way: str, scope: str
) -> None:
    session = edited(case, scope=scope)
    first = len(session.tokenizer(OPENINGS[0])["input_ids"])
    anything = list(range(len(session.tokenizer)))
    for fact in EDITS[:3]:
        ids = session.tokenizer(fact["prompt"])["input_ids"]

        def allowed(_: int, so_far: torch.Tensor, ids: list[int] = ids) -> list[int]:
            return [ids[len(so_far)]] if len(so_far) < len(ids) else anything

        steps = len(ids) - first + 1  # the last one has read the subject's last token
        with answered(first_projection(session, case)) as passes:
            generated(
                session,
                OPENINGS[0],
                prefix_allowed_tokens_fn=allowed,
                max_new_tokens=steps,
                use_cache=True,
                **WAYS[way],
            )
        assert [open_.shape[1] for open_ in passes] == [first] + [1] * (steps - 1)
        if scope == "leverage":
            assert passes[-1].any()
        else:
            assert not any(open_.any() for open_ in passes[1:])


# --- the paper's rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", [*CASES, "gemma2"])
def test_padding_does_not_matter_to_the_paper_rule_with_any_cache(
    start: Callable[..., EditSession], facts: list[dict[str, str]], case: str, cache: str
) -> None:
    if case == "gemma2" and cache == "static" and transformers.__version__.startswith("4."):
        pytest.skip("there its two kinds of attention do not fit one static cache")
    session = start(
        case, scope="zscore", alpha=1.0, clamp_norm_factor=8.0, v_num_grad_steps=15, mom2_update_weight=0.1
    )
    session.edit(facts)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **CACHES[cache]}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    texts = [fact["prompt"] for fact in facts]
    assert len({len(session.tokenizer(text)["input_ids"]) for text in texts}) > 1
    together = session.model.generate(**padded(session, texts), **settings)
    for b, text in enumerate(texts):
        alone = session.model.generate(**padded(session, [text]), **settings)
        for row, expected in zip(together.logits, alone.logits, strict=True):
            assert zoo.relative(row[b], expected[0]) < 1e-4, text
