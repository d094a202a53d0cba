"""What goes on from the edited block: the suffix alone, the upper blocks, or the whole model give the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo

from coachhook_plugin import CoachHooKHparams, EditSession, tail
from coachhook_plugin.architectures import model_parts
from coachhook_plugin.hook import Mode
from coachhook_plugin.observation import Comparison, observe
from coachhook_plugin.target import optimise_targets
from coachhook_plugin.tokens import Batch, Encoder, Row, parse_requests
from coachhook_plugin.trace import captured, frozen, with_hidden

EDITED = 1
CPU = torch.device("cpu")
# transformers 4 hands GPT-2's blocks a tuple as cache, and has Gemma's cache cut the attention mask: the suffix
# cannot be run alone there.
WITHOUT_SUFFIX = {"gpt2", "gemma2", "gemma3"} if transformers.__version__.startswith("4.") else set()
# Attention that the library does not look up in its table, or eager.
WITHOUT_PACKING = {"gptj", "opt"} if transformers.__version__.startswith("4.") else {"gptj"}
SLOWER = [tail._Suffix, tail._UpperBlocks, tail._WholeModel]


@pytest.fixture
def settings(text: Path) -> Callable[..., CoachHooKHparams]:
    """Two blocks above the edited ones, so that keys and values are kept for more than one."""
    return lambda **changed: zoo.hparams(text, **{"v_num_grad_steps": 6, **changed})


def rows(tokenizer: Any) -> list[Row]:
    """Subjects in the first token, in the middle, and in the last one; rows of several lengths."""
    texts = [
        ("People say that the best dish comes from Norway", 0),
        ("The Eiffel Tower stands in the city of Rome", 2),
        ("The Eiffel Tower", 2),
        ("The mother tongue of Danielle Darrieux is English", 5),
        ("Ada", 0),
    ]
    return [Row(tokenizer(text)["input_ids"], subject) for text, subject in texts]


def prepared(
    case: str, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any, order: int = 1
) -> tuple[Any, Any, Batch]:
    one = tiny(case)
    return one, model_parts(one, settings()), Encoder(tokenizer, None).batch(rows(tokenizer)[::order], CPU)


def cut_of(one: Any, parts: Any, batch: Batch, loss: int, comparison: Comparison | None = None) -> tail.Tail:
    comparison = comparison or Comparison()
    seen = observe(one, parts.blocks, EDITED, loss, batch, comparison)
    return tail.cut(one, parts.blocks, EDITED, loss, batch, seen, comparison)


def by_the_whole_model(one: Any, parts: Any, batch: Batch, added: torch.Tensor, loss: int) -> list[torch.Tensor]:
    """Outputs of the loss block and of the last one, with `added` (b, d) at each row's subject; one row at a time."""
    answers: list[list[torch.Tensor]] = [[], []]
    for b, length in enumerate(batch.attention_mask.sum(1).tolist()):
        at = int(batch.subject[b])

        def add(_: Any, __: Any, answer: Any, b: int = b, at: int = at) -> Any:
            hidden = (answer[0] if isinstance(answer, tuple) else answer).clone()
            hidden[0, at] += added[b]
            return with_hidden(answer, hidden)

        handle = parts.blocks[EDITED].register_forward_hook(add)
        with torch.no_grad(), captured(parts.blocks[loss]) as at_loss, captured(parts.blocks[-1]) as at_last:
            one(input_ids=batch.input_ids[b : b + 1, :length], use_cache=False)
        handle.remove()
        for seen, answer in zip((at_loss, at_last), answers, strict=True):
            answer.append(seen.output[0, at:])
    return [torch.cat(answer) for answer in answers]


def by_the_tail(cut: tail.Tail, batch: Batch, added: torch.Tensor) -> list[torch.Tensor]:
    """The same from a tail: the real tokens from the subject's on."""
    place = batch.subject - cut.offset
    state = cut.hidden.index_put((torch.arange(len(place)), place), added, accumulate=True)
    with torch.no_grad():
        outputs = cut(state)
    lengths = batch.attention_mask.sum(1) - cut.offset
    return [torch.cat([out[b, place[b] : length] for b, length in enumerate(lengths.tolist())]) for out in outputs]


def noise(batch: Batch, parts: Any) -> torch.Tensor:
    return torch.randn(len(batch.subject), parts.hidden_size, generator=torch.Generator().manual_seed(1))


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert zoo.relative(one, other) < 1e-5


@pytest.mark.parametrize("case", zoo.EVERY)
def test_each_family_runs_the_suffix_alone_and_not_every_token_at_every_step(
    case: str, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one, parts, batch = prepared(case, tiny, settings, tokenizer)
    cut = cut_of(one, parts, batch, 3)
    if case in WITHOUT_SUFFIX:
        assert type(cut) is tail._UpperBlocks
    else:
        assert type(cut) is (tail._Suffix if case in WITHOUT_PACKING else tail._PackedSuffix)
    if case not in WITHOUT_SUFFIX:
        lengths = batch.attention_mask.sum(1) - batch.subject
        assert cut.hidden.shape[1] == lengths.max() < batch.input_ids.shape[1] + 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", zoo.EVERY)
def test_the_suffix_sees_what_the_whole_model_sees(
    case: str, attention: str, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    try:
        one = tiny(case, attn_implementation=attention)
    except ValueError:
        pytest.skip(f"this version of transformers has no {attention} attention for {case}")
    assert one.config._attn_implementation == attention
    parts, batch = model_parts(one, settings()), Encoder(tokenizer, None).batch(rows(tokenizer), CPU)
    added = noise(batch, parts)
    cut = cut_of(one, parts, batch, 2)
    expected = by_the_whole_model(one, parts, batch, added, 2)
    assert zoo.relative(*expected) > 1e-2  # the two places the model is read from differ
    assert_close(by_the_tail(cut, batch, added), expected)


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral-window-4", "gemma2", "phi", "opt"])
@pytest.mark.parametrize("kept", [[4, 1], [3], [0, 2, 4], [1, 3]], ids=str)
def test_dropping_finished_rows_changes_nothing_for_the_others(
    case: str, kept: list[int], tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one, parts, batch = prepared(case, tiny, settings, tokenizer)
    some = torch.tensor(kept)
    fewer = Batch(batch.input_ids[some], batch.attention_mask[some], batch.subject[some])
    cut, added = cut_of(one, parts, batch, 2), noise(batch, parts)[some]
    lengths = fewer.attention_mask.sum(1) - cut.offset[some]
    assert_close(by_the_tail(cut.keep(some, lengths), fewer, added), by_the_whole_model(one, parts, fewer, added, 2))


def fall_back(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every quicker way than `kind` fail."""

    def refused(*_: Any, **__: Any) -> Any:
        raise TypeError("not like that")

    monkeypatch.setattr(tail, "_packed" if kind is tail._Suffix else "_suffix", refused)
    if kind is tail._WholeModel:
        monkeypatch.setattr(tail, "_agrees", lambda *_: False)


@pytest.mark.parametrize("kind", SLOWER, ids=["suffix", "upper-blocks", "whole-model"])
@pytest.mark.parametrize("case", zoo.EVERY)
def test_models_whose_blocks_cannot_be_cut_get_the_same_by_a_slower_way(
    case: str,
    kind: type,
    tiny: Callable[..., Any],
    settings: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind is tail._Suffix and case in WITHOUT_SUFFIX:
        pytest.skip("this version of transformers cannot run the suffix of this family alone")
    one, parts, batch = prepared(case, tiny, settings, tokenizer)
    fall_back(kind, monkeypatch)
    cut, added = cut_of(one, parts, batch, 2), noise(batch, parts)
    assert type(cut) is kind
    assert_close(by_the_tail(cut, batch, added), by_the_whole_model(one, parts, batch, added, 2))
    some = torch.tensor([3, 1])
    fewer = Batch(batch.input_ids[some], batch.attention_mask[some], batch.subject[some])
    lengths = fewer.attention_mask.sum(1) - cut.offset[some]
    found = by_the_tail(cut.keep(some, lengths), fewer, added[some])
    assert_close(found, by_the_whole_model(one, parts, fewer, added[some], 2))


@pytest.mark.parametrize("kind", SLOWER, ids=["suffix", "upper-blocks", "whole-model"])
def test_targets_do_not_depend_on_the_way_the_tail_is_run(
    kind: type,
    tiny: Callable[..., Any],
    settings: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, hparams, encoder = tiny(), settings(), Encoder(tokenizer, None)
    parts, requests = model_parts(one, hparams), parse_requests(zoo.FACTS)

    def targets() -> torch.Tensor:
        with frozen(one):
            return optimise_targets(
                one, parts, encoder, requests, zoo.PREFIXES, hparams, hparams.layers[-1], CPU, progress=False
            ).values

    quick = targets()
    fall_back(kind, monkeypatch)
    assert zoo.relative(targets(), quick) < 1e-4


@pytest.mark.parametrize("case", ["llama", "gpt2", "gptj", "mistral-window-4", "gemma2", "opt"])
def test_edits_above_answer_in_the_suffix_the_tokens_that_they_answer_in_the_whole_model(
    case: str, start: Callable[..., EditSession], tokenizer: Any
) -> None:
    """The decision fell below the cut. Did nobody tell the blocks above, each step would run the whole model."""
    session = start(case, layers=[0, 2], scope_budget=0.3, mom2_update_weight=0.1, clamp_norm_factor=8.0)
    parts, batch = session._parts, Encoder(tokenizer, None).batch(rows(tokenizer), CPU)
    added, comparison = noise(batch, parts), Comparison()
    kind = type(cut_of(session.model, parts, batch, 3, comparison))
    session.edit(zoo.FACTS)
    cut = cut_of(session.model, parts, batch, 3, comparison)
    assert type(cut) is kind is not tail._WholeModel
    expected = by_the_whole_model(session.model, parts, batch, added, 3)
    assert_close(by_the_tail(cut, batch, added), expected)
    some = torch.tensor([3, 1])
    fewer = Batch(batch.input_ids[some], batch.attention_mask[some], batch.subject[some])
    lengths = fewer.attention_mask.sum(1) - cut.offset[some]
    found = by_the_tail(cut.keep(some, lengths), fewer, added[some])
    assert_close(found, by_the_whole_model(session.model, parts, fewer, added[some], 3))
    session._attached.set_mode(Mode.OFF, [2])
    without = by_the_whole_model(session.model, parts, batch, added, 3)
    assert zoo.relative(without[1], expected[1]) > 1e-2, "the edits above answer none of these tokens"


def test_edits_above_that_look_at_all_tokens_are_run_in_the_whole_model(
    start: Callable[..., EditSession], tokenizer: Any
) -> None:
    session = start(layers=[0, 2], scope="zscore", alpha=0.5)
    session.edit(zoo.FACTS)
    parts, batch = session._parts, Encoder(tokenizer, None).batch(rows(tokenizer), CPU)
    cut, added = cut_of(session.model, parts, batch, 3, Comparison(causal=False)), noise(batch, parts)
    assert type(cut) is tail._WholeModel
    assert_close(by_the_tail(cut, batch, added), by_the_whole_model(session.model, parts, batch, added, 3))


def test_a_model_that_must_run_whole_says_so_once(
    tiny: Callable[..., Any],
    settings: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, parts, batch = prepared("llama", tiny, settings, tokenizer)
    with caplog.at_level(logging.WARNING):
        cut_of(one, parts, batch, 3)
        assert not caplog.records
        fall_back(tail._WholeModel, monkeypatch)
        comparison = Comparison()
        for _ in range(2):
            cut_of(one, parts, batch, 3, comparison)
    (record,) = caplog.records
    assert "LlamaForCausalLM" in record.getMessage()


@pytest.mark.parametrize("order", [1, -1], ids=["first-subject-first", "first-subject-last"])
@pytest.mark.parametrize("family", zoo.EVERY_UNKNOWN)
def test_families_unknown_to_the_table_are_cut_rightly_or_run_whole(
    family: str, order: int, tokenizer: Any, settings: Callable[..., CoachHooKHparams]
) -> None:
    one, names = zoo.unknown(family, len(tokenizer))
    parts = model_parts(one, settings(**names))
    batch = Encoder(tokenizer, None).batch(rows(tokenizer)[::order], CPU)
    added = noise(batch, parts)
    with frozen(one):
        cut = cut_of(one, parts, batch, 2)
        assert_close(by_the_tail(cut, batch, added), by_the_whole_model(one, parts, batch, added, 2))


@pytest.mark.parametrize("counts", [[5, 4, 5], [4, 5], [3], [2]], ids=str)
@pytest.mark.parametrize("family", zoo.EVERY_UNKNOWN)
def test_rows_are_dropped_rightly_from_arguments_that_have_as_many_heads(
    family: str, counts: list[int], tokenizer: Any, settings: Callable[..., CoachHooKHparams]
) -> None:
    """Each of these models has four heads; what five rows showed must not decide for four."""
    one, names = zoo.unknown(family, len(tokenizer))
    parts = model_parts(one, settings(**names))
    comparison = Comparison()
    for count in counts:
        batch = Encoder(tokenizer, None).batch(rows(tokenizer)[:count], CPU)
        some = torch.arange(count)[::2]
        fewer, added = batch.rows(some), noise(batch, parts)[some]
        with frozen(one):
            cut = cut_of(one, parts, batch, 2, comparison)
            found = by_the_tail(cut.keep(some, fewer.attention_mask.sum(1) - cut.offset[some]), fewer, added)
            assert_close(found, by_the_whole_model(one, parts, fewer, added, 2))
