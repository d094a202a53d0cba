"""A session's folder: every batch is there when `edit` returns, whatever happens to the process or to the disk."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from plain import bits, logits_of, photograph, photograph_session, raising_at

import coachhook_plugin.store.files
import coachhook_plugin.store.journal
from coachhook_plugin import EditSession, FolderError, load_edits

pytestmark = pytest.mark.once

Start = Callable[..., EditSession]
Facts = list[dict[str, str]]

ROOT = Path(__file__).parents[2]
PROMPTS = [fact["prompt"] for fact in zoo.FACTS]


@pytest.fixture
def resume(tiny: Any, tokenizer: Any) -> Callable[[Path], EditSession]:
    return lambda folder: EditSession.resume(folder, tiny(), tokenizer, progress=False)


def answers(session: EditSession) -> list[bytes]:
    return [bits(logits) for logits in logits_of(session.model, session.tokenizer, PROMPTS)]


def told(session: EditSession) -> Any:
    lines = [{**edit.to_dict(), "time": ""} for edit in session.ledger]
    seen = photograph_session(session)
    del seen["state"]
    return session.state.step, seen, lines, answers(session)


@pytest.mark.parametrize("history_steps", [0, 1, 3, 100])
@pytest.mark.parametrize("changed", [{"scope": "leverage"}, {"scope": "zscore"}, {"use_hooks": False}], ids=str)
def test_a_resumed_session_is_the_one_that_was_left_after_any_step(
    start: Start, resume: Any, facts: Facts, tmp_path: Path, history_steps: int, changed: dict[str, Any]
) -> None:
    settings = {"history_steps": history_steps, "v_num_grad_steps": 2, **changed}
    plain, kept = start(**settings), start(session_dir=str(tmp_path), **settings)
    acts: list[Callable[[EditSession], Any]] = [
        lambda s: s.edit(facts[:2]),
        lambda s: s.edit(facts[2:3]),
        lambda s: s.forget(["2-1"]) if history_steps > 1 else s.edit(facts[1:2]),
        lambda s: s.edit(facts[1:3]),
        lambda s: s.rollback(to=s.state.history.base.step),
        lambda s: s.edit(facts),
        lambda s: s.edit(facts[:1]),
    ]
    for act in acts:
        act(plain)
        act(kept)
        assert told(load_edits(plain_model(kept), tmp_path, kept.tokenizer)) == told(plain)
        kept.detach()
        kept = resume(tmp_path)
        assert told(kept) == told(plain)
        assert kept.hparams.session_dir == str(tmp_path)


SHORT = [
    {"prompt": "Norway is", "subject": "Norway", "target_new": "Rome"},
    {"prompt": "Ada is", "subject": "Ada", "target_new": "Rome"},
]


@pytest.mark.parametrize("batches", [[zoo.FACTS, SHORT], [SHORT, zoo.FACTS, SHORT]], ids=["long-first", "short-first"])
def test_texts_past_a_window_leave_no_trace_in_how_later_batches_are_run(
    tiny: Any, tokenizer: Any, settings: Any, tmp_path: Path, batches: list[Facts]
) -> None:
    def new() -> Any:
        return tiny("mistral", sliding_window=5)

    hparams = settings(context_prefixes=[], v_num_grad_steps=2)
    plain = EditSession(new(), tokenizer, hparams, progress=False)
    kept = EditSession(new(), tokenizer, replace(hparams, session_dir=str(tmp_path)), progress=False)
    for batch in batches:
        plain.edit(batch)
        kept.edit(batch)
        kept.close()
        kept = EditSession.resume(tmp_path, new(), tokenizer, progress=False)
    assert told(kept) == told(plain)


def test_edits_above_the_first_layer_are_met_again_by_a_resumed_session(
    start: Start, resume: Any, facts: Facts, tmp_path: Path
) -> None:
    settings = {"spread": "boundary", "layers": [0, 1, 2], "mom2_update_weight": 0.1}
    plain, kept = start(**settings), start(session_dir=str(tmp_path), **settings)
    for target in ("Seoul", "Rome"):
        batch = [{**fact, "target_new": target} for fact in facts]
        plain.edit(batch)
        kept.edit(batch)
        kept.close()
        kept = resume(tmp_path)
    assert told(kept) == told(plain)


def plain_model(session: EditSession) -> Any:
    return zoo.model("llama", len(session.tokenizer))


def test_a_batch_is_one_new_file(start: Start, facts: Facts, tmp_path: Path) -> None:
    session = start(session_dir=str(tmp_path))
    session.edit(facts[:1])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    session.edit(facts[1:2])
    new = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    (name,) = set(new) - set(before)
    assert name.parent.name == "steps"
    assert all(new[path] == before[path] for path in before if path.is_file())


def test_going_back_and_elsewhere_leaves_no_trace_of_what_was_taken_back(
    start: Start, resume: Any, facts: Facts, tmp_path: Path
) -> None:
    session = start(session_dir=str(tmp_path))
    states = [session.state]
    for fact in facts:
        session.edit([fact])
        states.append(session.state)
    session.restore(states[2])
    session.restore(states[4])  # and forward again, as an undo of an undo
    session.restore(states[2])
    session.edit(facts[3:])
    expected = told(session)
    session.detach()
    assert [edit.target_new for edit in load_edits(plain_model(session), tmp_path).ledger] == [
        fact["target_new"] for fact in (facts[0], facts[1], facts[3])
    ]
    assert told(resume(tmp_path)) == expected


@pytest.mark.parametrize("history_steps", [1, 100])
def test_a_look_at_an_earlier_state_takes_nothing_off_the_disk(
    start: Start, resume: Any, facts: Facts, tmp_path: Path, history_steps: int
) -> None:
    session = start(session_dir=str(tmp_path), history_steps=history_steps)
    untroubled = start(history_steps=history_steps)
    for fact in facts[:2]:
        untroubled.edit([fact])
        before = session.state
        session.edit([fact])
    newest, expected = session.state, told(session)
    on_disk = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    session.show(before)
    assert len(session) == 1
    assert answers(session) != expected[-1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == on_disk
    assert told(load_edits(plain_model(session), tmp_path, session.tokenizer)) == expected
    session.show(newest)
    assert told(session) == expected
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == on_disk
    for one in (session, untroubled):
        one.edit(facts[2:])
    session.detach()
    assert told(resume(tmp_path)) == told(untroubled)
    with pytest.raises(ValueError, match="state: is that of other weights or other hyperparameters"):
        start(layers=[0]).show(newest)


def test_what_a_killed_rollback_leaves_is_neither_counted_nor_kept(
    start: Start, resume: Any, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(session_dir=str(tmp_path))
    for fact in facts[:3]:
        session.edit([fact])
    with monkeypatch.context() as patch:
        patch.setattr(coachhook_plugin.store.folder, "remove", lambda path: None)  # it is killed before that
        session.rollback(to=2)
    expected = told(session)
    session.detach()
    assert len(list((tmp_path / "steps").iterdir())) == 2
    assert told(load_edits(plain_model(session), tmp_path, session.tokenizer)) == expected
    again = resume(tmp_path)
    assert told(again) == expected
    assert len(list((tmp_path / "steps").iterdir())) == 1
    again.edit(facts[3:])


def test_a_temporary_file_of_safetensors_does_not_outlive_a_kill(
    start: Start, resume: Any, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(session_dir=str(tmp_path), history_steps=1)
    session.edit(facts[:1])
    expected = told(session)

    def killed(tensors: Any, path: Path, **options: Any) -> None:
        (path.parent / ".tmpAbC123").write_bytes(b"half")  # so it writes since 0.8
        os._exit(9)

    monkeypatch.setattr(coachhook_plugin.store.files, "save_file", killed)
    pid = os.fork()
    if not pid:
        try:
            session.edit(facts[1:2])  # the history is folded: every file is written anew
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert list(tmp_path.rglob(".tmpAbC123"))
    session.detach()
    assert told(resume(tmp_path)) == expected
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".coachhook.lock"]


def test_a_second_writer_is_refused_until_the_first_is_gone(
    start: Start, resume: Any, facts: Facts, tmp_path: Path, settings: Any, tiny: Any, tokenizer: Any
) -> None:
    session = start(session_dir=str(tmp_path))
    session.edit(facts[:1])
    program = f"""
import zoo
from coachhook_plugin import EditSession
tokenizer = zoo.tokenizer()
try:
    EditSession.resume({str(tmp_path)!r}, zoo.model("llama", len(tokenizer)), tokenizer)
except ValueError as error:
    print("refused:", error)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "another session is writing to this folder" in done.stdout, done.stderr
    other = start()
    before = photograph(other.model)
    for act in (lambda: resume(tmp_path), lambda: start(session_dir=str(tmp_path)), lambda: other.save(tmp_path)):
        with pytest.raises(FolderError, match="another session"):
            act()
    assert photograph(other.model) == before
    load_edits(tiny(), tmp_path)  # reading is free
    session.edit(facts[1:2])
    session.close()
    session.edit(facts[2:3])  # in memory
    again = resume(tmp_path)
    assert len(again) == 2


def test_a_new_session_does_not_write_over_an_old_one(start: Start, facts: Facts, tmp_path: Path) -> None:
    session = start(session_dir=str(tmp_path))
    session.edit(facts[:1])
    session.detach()
    with pytest.raises(FolderError, match=r"holds a session already; go on with EditSession\.resume"):
        start(session_dir=str(tmp_path))


def test_there_is_nothing_to_resume_in_an_empty_folder(resume: Any, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="holds no session"):
        resume(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_saved_folder_can_become_a_sessions_own(start: Start, resume: Any, facts: Facts, tmp_path: Path) -> None:
    session = start()
    session.edit(facts[:2])
    session.save(tmp_path)
    again = resume(tmp_path)
    for one in (session, again):
        one.edit(facts[2:])
    assert told(again) == told(session)
    again.save(tmp_path)
    assert not list((tmp_path / "steps").iterdir())
    assert len((tmp_path / "ledger-2.jsonl").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="own folder"):
        again.save(tmp_path, memory=False)
    again.detach()
    assert told(resume(tmp_path)) == told(session)
    session.save(tmp_path / "bare", memory=False)
    with pytest.raises(FolderError, match=r"memory\.safetensors is missing"):
        resume(tmp_path / "bare")


def test_steps_need_the_memory_they_follow(start: Start, tiny: Any, facts: Facts, tmp_path: Path) -> None:
    session = start(session_dir=str(tmp_path))
    session.edit(facts[:1])
    session.edit(facts[1:])
    (tmp_path / "memory.safetensors").unlink()
    with pytest.raises(FolderError, match="cannot be read"):
        load_edits(tiny(), tmp_path)


@contextmanager
def disk_full(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "third batch"])
@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_undoes_the_batch_and_the_session_goes_on(
    start: Start, resume: Any, facts: Facts, tmp_path: Path, room: int, first: bool
) -> None:
    session, untroubled = start(session_dir=str(tmp_path)), start()
    if not first:
        for one in (session, untroubled):
            one.edit(facts[:1])
            one.edit(facts[1:2])
    before = told(session)
    on_disk = {path.name for path in tmp_path.rglob("*")}
    with disk_full(room), pytest.raises(FolderError, match="cannot be written"):
        session.edit(facts[2:])
    assert told(session) == before
    assert {path.name for path in tmp_path.rglob("*")} - {"steps"} == on_disk - {"steps"}
    for one in (session, untroubled):
        one.edit(facts[2:])
    assert told(session) == told(untroubled)
    session.detach()
    assert told(resume(tmp_path)) == told(untroubled)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), KeyboardInterrupt()], ids=["read-only", "^C"])
def test_a_write_that_fails_anywhere_leaves_folder_and_session_agreeing(
    start: Start,
    resume: Any,
    facts: Facts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    error: BaseException,
) -> None:
    session, untroubled = start(session_dir=str(tmp_path), history_steps=2), start(history_steps=2)
    for fact in facts[:2]:
        session.edit([fact])
        untroubled.edit([fact])
    before = told(session)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else FolderError
    with raising_at(monkeypatch, os, call, number, error, after=True) as calls, pytest.raises(expected):
        session.edit(facts[2:])  # the history is folded: every file is written anew
    assert calls[0] > number
    assert told(session) == before
    copied = tmp_path.parent / f"{tmp_path.name}-copy"  # as a process that is killed now would leave it
    shutil.copytree(tmp_path, copied)
    assert told(resume(copied)) == before
    for one in (session, untroubled):
        one.edit(facts[2:])
    session.detach()
    assert told(resume(tmp_path)) == told(untroubled)


def test_a_step_that_landed_just_before_an_interruption_is_not_found_again(
    start: Start, resume: Any, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, untroubled = start(session_dir=str(tmp_path)), start()
    for one in (session, untroubled):
        one.edit(facts[:1])
    steps = coachhook_plugin.store.journal.steps
    with (
        raising_at(monkeypatch, steps, "append", 0, KeyboardInterrupt(), after=True),
        pytest.raises(KeyboardInterrupt),
    ):
        session.edit(facts[1:2])
    for one in (session, untroubled):
        one.edit(facts[2:])
    session.detach()
    assert told(resume(tmp_path)) == told(untroubled)


def test_a_session_in_memory_may_be_kept_in_a_folder_from_now_on(
    start: Start, resume: Any, facts: Facts, tmp_path: Path
) -> None:
    session, untroubled = start(), start()
    given = session.hparams
    for one in (session, untroubled):
        one.edit(facts[:2])
    session.keep_in(tmp_path / "run")
    assert session.hparams.session_dir == str(tmp_path / "run")
    assert given.session_dir is None  # the caller's own
    for one in (session, untroubled):
        one.edit(facts[2:])
    with pytest.raises(FolderError, match=r"holds a session already|another session"):
        untroubled.keep_in(tmp_path / "run")
    assert untroubled.hparams.session_dir is None
    session.detach()
    assert told(resume(tmp_path / "run")) == told(untroubled)


def test_steps_stay_small_after_more_edits_than_a_key_has_entries(
    start: Start, resume: Any, facts: Facts, tmp_path: Path
) -> None:
    m = 48
    session = start(session_dir=str(tmp_path), v_num_grad_steps=1)
    batch = [{**fact, "prompt": f"{word} {fact['prompt']}"} for word in ("Old", "The", "People") for fact in facts]
    columns, sizes = [0], [0]  # of edited keys, and the largest step, by number of batches
    while columns == sorted(columns):  # until they are put together
        session.edit(batch)
        columns.append(len(session.state.scope.edited.T))
        sizes.append(max((path.stat().st_size for path in (tmp_path / "steps").glob("*")), default=0))
    last = len(columns) - 1
    assert columns[-1] == m < columns[-2] <= 2 * m
    assert max(sizes[2:last]) < 2 * sizes[3]
    expected = told(session)
    session.detach()
    again = resume(tmp_path)
    assert told(again) == expected
    again.rollback(to=last - 1)
    assert again.state.scope.edited.shape == (m, columns[-2])
    again.edit(batch)
    assert photograph_session(again)["layers"] == expected[1]["layers"]
    assert photograph_session(again)["scope"] == expected[1]["scope"]


def test_the_folder_is_found_wherever_the_process_goes(
    start: Start, resume: Any, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = start(session_dir="run")
    session.edit(facts[:1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    session.edit(facts[1:2])
    session.detach()
    assert not any((tmp_path / "elsewhere").iterdir())
    assert len(resume(tmp_path / "run")) == 2


def test_a_session_may_be_closed_by_another_thread(start: Start, resume: Any, facts: Facts, tmp_path: Path) -> None:
    session = start(session_dir=str(tmp_path))
    session.edit(facts[:1])
    thread = threading.Thread(target=session.close)
    thread.start()
    thread.join()
    assert len(resume(tmp_path)) == 1


def test_copies_of_a_session_do_not_write_to_its_folder(
    start: Start, resume: Any, facts: Facts, tmp_path: Path
) -> None:
    session = start(session_dir=str(tmp_path))
    session.edit(facts[:1])
    copies = [copy.deepcopy(session.model), pickle.loads(pickle.dumps(session.model))]
    for model in copies:
        twin = EditSession.of(model)
        assert twin is not None
        assert answers(twin) == answers(session)
        twin.edit(facts[1:])
        assert "session_dir" not in repr(twin)
    session.edit(facts[1:2])
    session.detach()
    assert len(resume(tmp_path)) == 2


def test_sessions_killed_at_random_moments_end_as_the_undisturbed_one(tmp_path: Path) -> None:
    """`python tests/kill_many.py` does it 200 times."""
    kills = os.environ.get("COACHHOOK_KILLS", "12")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "kill_many.py"), "--kills", kills]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{kills} kills")


@torch.no_grad()
def test_a_flipped_byte_anywhere_is_found_or_changes_nothing(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    """1,200 single bytes in all files of a folder with steps under way, a third of them in the small files."""
    session = start(session_dir=str(tmp_path), v_num_grad_steps=1)
    for fact in facts[:3]:
        session.edit([fact])
    session.rollback(to=2)
    session.edit(facts[3:])
    session.close()
    ids = torch.tensor([session.tokenizer(PROMPTS[0])["input_ids"]])
    expected = session.model(input_ids=ids).logits
    model, chance = tiny(), torch.Generator().manual_seed(0)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) == 6
    small = [path for path in files if path.suffix in (".json", ".jsonl")]
    refused = 0
    for number in range(1200):
        pool = small if number % 3 == 0 else files
        path = pool[int(torch.randint(len(pool), (), generator=chance))]
        data = bytearray(path.read_bytes())
        at = int(torch.randint(len(data), (), generator=chance))
        data[at] ^= int(torch.randint(1, 256, (), generator=chance))
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            loaded = load_edits(model, tmp_path)
        except FolderError:
            refused += 1
        else:
            assert torch.equal(model(input_ids=ids).logits, expected), (path.name, at)
            loaded.detach()
        finally:
            path.write_bytes(whole)
        assert EditSession.of(model) is None
    assert 1000 < refused <= 1200
