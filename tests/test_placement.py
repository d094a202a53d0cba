"""Where the memories rest: with the weights, in main memory or on disk, the edits are the same."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from plain import bits, photograph_session

import coachhook_plugin.placement
from coachhook_plugin import EditSession, load_edits
from coachhook_plugin.cache import cache_dir
from coachhook_plugin.hparams import differing
from coachhook_plugin.placement import Place, at_rest, room_for

PLACES = get_args(Place)
Start = Callable[..., EditSession]
Facts = list[dict[str, str]]


def bits_of(session: EditSession) -> list[tuple[bytes, bytes]]:
    return [(bits(of.delta), bits(of.memory.matrix)) for of in session.state.layers.values() if of.memory is not None]


@pytest.mark.parametrize("place", PLACES)
def test_a_matrix_comes_to_rest_unchanged(place: Place) -> None:
    matrix = torch.randn(7, 7, dtype=torch.float64)
    rested = at_rest(matrix, place)
    assert torch.equal(rested, matrix)
    assert room_for(rested, place).shape == matrix.shape


@pytest.mark.parametrize("place", [place for place in PLACES if place != "weights"])
def test_edits_are_the_same_bit_for_bit_wherever_the_memory_rests(
    start: Start, facts: Facts, tmp_path: Path, place: Place
) -> None:
    plain, session = start(history_steps=1), start(history_steps=1, memory_device=place)
    for one in (plain, session):
        for batch in (facts[:2], facts[2:3], facts[3:]):
            one.edit(batch)
        one.save(tmp_path / one.hparams.memory_device)
        one.rollback(to=2)
    assert bits_of(session) == bits_of(plain)
    model = start().model
    EditSession.of(model).detach()  # type: ignore[union-attr]
    again = EditSession.resume(tmp_path / place, model, session.tokenizer, progress=False)
    assert {of.memory.place for of in again.state.layers.values() if of.memory is not None} == {place}
    again.rollback(to=2)
    assert again.edit(facts[3:]).nll == plain.edit(facts[3:]).nll
    assert bits_of(again) == bits_of(plain)


def test_edits_made_where_there_is_much_memory_go_on_where_there_is_less(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    plain = start()
    for folder in ("loaded", "resumed"):
        session = start(session_dir=str(tmp_path / folder))
        session.edit(facts[:2])
        session.edit(facts[2:3])
        session.close()
    for batch in (facts[:2], facts[2:3], facts[3:]):
        plain.edit(batch)
    loaded = load_edits(tiny(), tmp_path / "loaded", plain.tokenizer, progress=False, memory_device="cpu")
    resumed = EditSession.resume(tmp_path / "resumed", tiny(), plain.tokenizer, False, memory_device="disk")
    for session, place in ((loaded, "cpu"), (resumed, "disk")):
        assert session.hparams.memory_device == place
        session.edit(facts[3:])
        for layers in (session.state.layers, session.state.history.base.layers):  # type: ignore[union-attr]
            assert {of.memory.place for of in layers.values() if of.memory is not None} == {place}
        assert bits_of(session) == bits_of(plain)
    resumed.save(tmp_path / "resumed")
    resumed.close()
    assert EditSession.resume(tmp_path / "resumed", tiny(), plain.tokenizer).hparams.memory_device == "disk"
    assert differing(plain.hparams, replace(plain.hparams, memory_device="cpu")) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's list of mappings is Linux's")
def test_a_memory_on_disk_is_mapped_and_leaves_no_file_behind(start: Start, facts: Facts) -> None:
    folder = str(cache_dir() / "memory")

    def mapped() -> int:
        return sum(folder in line for line in Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    before = mapped()
    session = start(memory_device="disk")
    session.edit(facts)
    layers = len(session.state.layers)
    assert mapped() == before + 2 * layers  # the beginning, to roll back to, and now
    assert list(Path(folder).iterdir()) == []
    session.edit(facts)
    assert mapped() == before + 2 * layers, "memory grows with every batch"


def test_without_history_the_memory_is_held_once(start: Start, facts: Facts) -> None:
    session = start(history_steps=0)
    session.edit(facts)
    assert session.state.history is not None
    for layer, of in session.state.layers.items():
        base = session.state.history.base.layers[layer]
        assert base.memory is not None
        assert of.memory is not None
        assert base.memory.matrix.data_ptr() == of.memory.matrix.data_ptr()


def test_a_full_disk_is_told_in_a_sentence_and_the_session_goes_on(
    start: Start, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(memory_device="disk")
    session.edit(facts[:2])
    before = photograph_session(session)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(coachhook_plugin.placement, "_reserve", full)
    with pytest.raises(ValueError, match=r"memory_device: no room for [\d,]+ bytes in .*; .*memory_device: cpu"):
        session.edit(facts[2:])
    assert photograph_session(session) == before
    monkeypatch.undo()
    session.edit(facts[2:])
    assert len(session) == len(facts)
