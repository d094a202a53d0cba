"""Text for the key statistics: the same tokens each time, written by the model once and read again after that."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo

from coachhook_plugin.text import ROWS, SAMPLED_ROWS, PackedText, SampledText, text_source

CPU = torch.device("cpu")
LENGTH = 12  # of a row of sampled text
Source = Callable[..., SampledText]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def passes() -> list[int]:
    """Grows with each pass of a model that `source` was given."""
    return []


@pytest.fixture
def source(tiny: Callable[..., Any], tokenizer: Any, passes: list[int]) -> Source:
    """`source(seed=1)`: text sampled from a tiny model, in so many batches."""

    def made(one: Any = None, seed: int = 0, batches: int = 2, length: int = LENGTH, with_: Any = None) -> SampledText:
        one = tiny() if one is None else one
        one.register_forward_pre_hook(lambda *_: passes.append(1))
        tokens = batches * SAMPLED_ROWS * length
        return SampledText(one, tokenizer if with_ is None else with_, tokens, seed, CPU, length)

    return made


def test_sampled_text_is_the_same_from_any_starting_point_and_needs_no_global_seed(
    source: Source, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()

    def batches(seed: int, order: list[int], folder: str) -> dict[int, torch.Tensor]:
        monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / folder))  # nothing is read back
        one = source(model, seed=seed, batches=3)
        return {i: one.batch(i) for i in order}

    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    first = batches(0, [0, 1, 2], "one")
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    torch.manual_seed(2)
    again = batches(0, [2, 0], "two")
    assert all(torch.equal(again[i], first[i]) for i in again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(batches(1, [0], "three")[0], first[0])


def test_sampled_text_is_as_long_as_asked_and_has_no_special_tokens(source: Source, tokenizer: Any) -> None:
    one = source(batches=3)
    assert one.batches == 3
    for i in range(3):
        assert one.batch(i).shape == (SAMPLED_ROWS, LENGTH)
        assert one.batch(i).dtype == torch.int64
        assert not torch.isin(one.batch(i), torch.tensor(tokenizer.all_special_ids)).any()
    assert len({tuple(row) for i in range(3) for row in one.batch(i).tolist()}) == 3 * SAMPLED_ROWS


def test_sampled_text_is_read_back_and_not_written_again(source: Source, passes: list[int], cache: Path) -> None:
    first = [source().batch(i) for i in range(2)]
    assert len(passes) == 2 * LENGTH  # a pass for each column
    assert len(list(cache.iterdir())) == 2
    passes.clear()
    assert all(torch.equal(source().batch(i), first[i]) for i in range(2))
    assert passes == []
    more = source(batches=3)  # a longer text goes on from where this one ends
    assert all(torch.equal(more.batch(i), first[i]) for i in range(2))
    assert passes == []
    more.batch(2)
    assert len(passes) == LENGTH


def test_text_starts_with_a_token_that_the_model_knows(source: Source) -> None:
    known, added = zoo.tokenizer(), zoo.tokenizer()
    added.add_special_tokens({"bos_token": "[BOS]"})
    assert torch.equal(source(with_=added).batch(0), source(with_=known).batch(0))


def test_what_was_written_and_what_is_read_are_not_the_same_tensor(source: Source) -> None:
    """A caller that scribbles on a batch spoils neither the file nor the next caller's batch."""
    one = source()
    for _ in range(2):
        expected = one.batch(0).clone()
        one.batch(0).zero_()
        assert torch.equal(one.batch(0), expected)


def test_text_of_another_model_seed_or_tokenizer_is_another_file(
    source: Source, tiny: Callable[..., Any], tokenizer: Any, passes: list[int], cache: Path
) -> None:
    first = source().batch(0)
    trained = tiny()
    with torch.no_grad():
        trained.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    allowed = zoo.tokenizer()
    allowed.add_special_tokens({"additional_special_tokens": tokenizer.convert_ids_to_tokens(first[0, :1].tolist())})
    others = {
        "weights": lambda: source(trained),
        "family": lambda: source(tiny("gpt2")),
        "seed": lambda: source(seed=1),
        "length": lambda: source(length=LENGTH + 1),
        "special tokens": lambda: source(with_=allowed),
    }
    for number, (what, other) in enumerate(others.items(), start=2):
        passes.clear()
        assert not torch.equal(other().batch(0), first), what
        assert len(list(cache.iterdir())) == number, what
        assert passes, what
    passes.clear()
    assert torch.equal(source().batch(0), first)
    assert passes == []


def archive(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, ids=np.zeros((SAMPLED_ROWS, LENGTH), dtype=np.int64))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not found"),
    "objects": lambda path: np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "archive": archive,
    "other shape": lambda path: np.save(path, np.zeros((SAMPLED_ROWS, LENGTH + 1), dtype=np.int64)),
    "other numbers": lambda path: np.save(path, np.zeros((SAMPLED_ROWS, LENGTH))),
    "no token of the model": lambda path: np.save(path, np.full((SAMPLED_ROWS, LENGTH), 10**6)),
    "negative": lambda path: np.save(path, np.full((SAMPLED_ROWS, LENGTH), -1)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_written_again(
    damage: str, source: Source, passes: list[int], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = source().batch(0)
    (path,) = cache.iterdir()
    DAMAGE[damage](path)
    passes.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(source().batch(0), first)
    assert len(passes) == LENGTH
    assert path.name in caplog.text
    passes.clear()
    assert torch.equal(source().batch(0), first)
    assert passes == []  # mended for good
    assert list(cache.iterdir()) == [path]


def test_a_write_that_is_cut_off_leaves_no_file_behind(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        first = source().batch(0)
    assert list(cache.iterdir()) == []
    assert torch.equal(source().batch(0), first)
    assert len(list(cache.iterdir())) == 1


def test_a_text_shorter_than_a_row_is_used_whole(tokenizer: Any) -> None:
    source = PackedText(["The mother tongue"], "short.txt", tokenizer, len(tokenizer), 1000, 128)
    ids = [*tokenizer("The mother tongue")["input_ids"], tokenizer.eos_token_id]
    assert source.batches == 1
    assert source.batch(0).tolist() == [ids]


def test_tokens_that_the_model_does_not_know_are_left_out_of_the_text(tokenizer: Any) -> None:
    """As an end-of-text token that was added to the tokenizer alone."""
    known = tokenizer("The mother tongue")["input_ids"]
    assert tokenizer.eos_token_id < max(known)
    source = PackedText(["The mother tongue"], "short.txt", tokenizer, max(known), 1000, 128)
    assert source.batch(0).tolist() == [[token for token in [*known, tokenizer.eos_token_id] if token != max(known)]]


def test_documents_are_packed_into_rows_of_one_length_that_are_cut_into_batches(tokenizer: Any) -> None:
    documents = [fact["prompt"] for fact in zoo.FACTS] * 40
    ids = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    source = PackedText(documents, "facts.txt", tokenizer, len(tokenizer), 600, 16)
    assert source.batches == -(-(600 // 16) // ROWS) == 3
    found = torch.cat([source.batch(i) for i in range(3)])
    assert found.flatten().tolist() == ids[: 600 // 16 * 16]  # the last, unfinished row is left out
    assert [len(source.batch(i)) for i in range(3)] == [ROWS, ROWS, 600 // 16 - 2 * ROWS]


@pytest.mark.parametrize("name", ["file", "self"])
def test_the_source_that_the_settings_name_is_long_enough(
    name: str, tiny: Callable[..., Any], tokenizer: Any, text: Path
) -> None:
    hparams = zoo.hparams(text if name == "file" else "self", mom2_key_multiple=20)
    source = text_source(tiny(), tokenizer, hparams, 48, CPU)
    assert isinstance(source, PackedText if name == "file" else SampledText)
    count = sum(source.batch(i).numel() for i in range(source.batches))
    assert count >= (20 * 48 if name == "self" else 20 * 48 - 127)  # rows are 128 long here
    assert source.batch(0).shape[1] <= 128


@pytest.mark.parametrize("name", ["/no/such/file.txt", "./missing", "~/missing.txt", "missing.txt"])
def test_a_mistyped_path_is_an_error_and_not_other_text(
    name: str, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match="mom2_dataset: there is no text file"):
        text_source(tiny(), tokenizer, settings(mom2_dataset=name), 48, CPU)


def test_a_file_in_another_encoding_is_a_clear_error(
    tmp_path: Path, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mom2_dataset: .*latin.txt is not UTF-8"):
        text_source(tiny(), tokenizer, settings(mom2_dataset=str(path)), 48, CPU)
