"""Where the subject and the target of a request lie among its tokens."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from coachhook_plugin import EditSession
from coachhook_plugin.tokens import Encoder, Request, Row, micro_batches, parse_requests

WORDS = [
    "The",
    "mother tongue",
    "Norway",
    "Ada",
    "of",
    "Łódź",
    "東京",
    "🙂👩‍👩‍👧",
    "O'Neil",
    "x1",
    "-",
    "dish,",
    "Zürich",
]
TEXT = st.lists(st.sampled_from(WORDS), min_size=0, max_size=4).map(" ".join)


class Slow:
    """A tokenizer that gives no offsets."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: str, **given: Any) -> Any:
        assert "return_offsets_mapping" not in given
        return self._inner(text, **given)


def with_ends(tokenizer: Any, template: str) -> Any:
    """The tokenizer, adding its special token before or after a text, as Llama or T5 do."""
    made = copy.deepcopy(tokenizer)
    special = made.eos_token
    made.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=template, special_tokens=[(special, made.eos_token_id)]),
        ]
    )
    return made


SPECIAL = "<|endoftext|>"
TEMPLATES = {"none": "$A", "first": f"{SPECIAL} $A", "last": f"$A {SPECIAL}", "both": f"{SPECIAL} $A {SPECIAL}"}
TOKENIZERS = {name: with_ends(zoo.tokenizer(), template) for name, template in TEMPLATES.items()}
EACH = pytest.mark.parametrize("ends", TEMPLATES)


def decoded(encoder: Encoder, ids: list[int]) -> str:
    return str(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@EACH
@pytest.mark.parametrize("slow", [False, True])
@given(before=TEXT, subject=TEXT.filter(bool), after=TEXT, prefix=st.sampled_from(["", "In fact. ", "Köln. "]))
def test_the_edit_is_put_at_the_subjects_last_token(
    ends: str, slow: bool, before: str, subject: str, after: str, prefix: str
) -> None:
    prompt = " ".join(part for part in (before, subject, after) if part)
    if prompt.count(subject) != 1:
        return
    tokenizer = TOKENIZERS[ends]
    encoder = Encoder(Slow(tokenizer) if slow else tokenizer, None)
    request = Request(prompt, subject, "Rome")
    row = encoder.prompt(prefix, request)
    assert row.ids == tokenizer(prefix + prompt)["input_ids"]
    start = 1 if ends in ("first", "both") else 0
    upto = decoded(encoder, row.ids[start : row.subject + 1])
    # Words end where tokens end here, so the tokens up to that one are the text up to the subject's end.
    assert upto == (prefix + prompt)[: len(prefix) + request.subject_end]


@EACH
@pytest.mark.parametrize("slow", [False, True])
@given(prompt=TEXT.filter(bool), target=TEXT.filter(bool), space=st.sampled_from(["", " ", "  "]))
def test_the_loss_is_read_at_the_targets_tokens_and_no_others(
    ends: str, slow: bool, prompt: str, target: str, space: str
) -> None:
    tokenizer = TOKENIZERS[ends]
    encoder = Encoder(Slow(tokenizer) if slow else tokenizer, None)
    row = encoder.with_target("", Request(prompt + space, prompt, target))
    start = 1 if ends in ("first", "both") else 0
    assert decoded(encoder, row.ids[start : row.target.start]) == prompt
    assert decoded(encoder, [row.ids[t] for t in row.target]) == (space or " ") + target
    assert row.target.stop == len(row.ids)  # no end token to predict
    assert row.subject == row.target.start - 1  # the subject is the whole prompt


def test_a_space_is_put_between_prompt_and_target_once(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, None)
    with_space, without = (encoder.with_target("", Request(p, "Ada", "Rome")) for p in ("Ada is ", "Ada is"))
    assert with_space == without
    assert with_space.ids == tokenizer("Ada is Rome")["input_ids"]


def test_a_subject_inside_a_token_is_edited_at_that_token(tokenizer: Any) -> None:
    """ "Norway" is one token; a subject that is a part of it has no better place."""
    row = Encoder(tokenizer, None).prompt("", Request("The dish of Norway", "Nor", "Rome"))
    assert tokenizer.decode([row.ids[row.subject]]).strip().startswith("Nor")


def test_the_kl_term_is_read_at_the_subjects_last_token(tokenizer: Any) -> None:
    row = Encoder(tokenizer, None).essence(Request("People say that Eiffel Tower", "Eiffel Tower", "Rome"))
    assert row.ids == tokenizer("Eiffel Tower is a")["input_ids"]
    assert row.subject == len(tokenizer("Eiffel Tower")["input_ids"]) - 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["pad", "eos only", "neither"])
def test_a_batch_holds_every_row_whatever_the_tokenizers_padding(tokenizer: Any, side: str, pad: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    if pad != "pad":
        tokenizer.pad_token = None
    if pad == "neither":
        tokenizer.eos_token = None
    rows = [Row([5, 6, 7, 8], 2), Row([9], 0), Row([1, 2], 1)]
    batch = Encoder(tokenizer, None).batch(rows, torch.device("cpu"))
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, 4)
    for b, row in enumerate(rows):
        assert batch.input_ids[b][batch.attention_mask[b].bool()].tolist() == row.ids
        assert batch.input_ids[b, batch.subject[b]] == row.ids[row.subject]
    assert batch.attention_mask.sum() == 7


def test_a_padding_token_that_the_model_has_no_embedding_for_changes_no_edit(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    """As added to a tokenizer that has none, where nobody resized the model."""
    padded, states = copy.deepcopy(tokenizer), []
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert padded.pad_token_id == len(tokenizer)
    for one in (tokenizer, padded):
        session = EditSession(tiny(), one, settings(mom2_dataset="self", context_prefixes=None), progress=False)
        session.edit(zoo.FACTS)
        states.append([layer.delta for layer in session.state.layers.values()])
    assert all(map(torch.equal, *states))


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 200))
def test_micro_batches_hold_every_request_once_within_the_budget(lengths: list[list[int]], budget: int) -> None:
    rows = [[Row([0] * n, 0) for n in request] for request in lengths]
    chunks = list(micro_batches(rows, budget))
    assert [i for chunk in chunks for i in chunk] == list(range(len(rows)))
    for chunk in chunks:
        size = sum(len(lengths[i]) for i in chunk) * max(max(lengths[i]) for i in chunk)
        assert size <= budget or len(chunk) == 1
    for one, following in itertools.pairwise(chunks):  # no chunk is cut earlier than it must be
        both = [*one, following[0]]
        assert sum(len(lengths[i]) for i in both) * max(max(lengths[i]) for i in both) > budget


def test_requests_are_read_from_mappings_and_request_objects_alike() -> None:
    mapping = {"prompt": "Ada is in", "subject": " Ada ", "target_new": " Rome", "ground_truth": "London", "id": 7}
    (one,), (other,) = parse_requests([mapping]), parse_requests(iter([Request("Ada is in", "Ada", "Rome")]))
    assert one == other == Request("Ada is in", "Ada", "Rome")
