"""The command line, from a file of facts to an edited answer, and what it says when something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zoo
from plain import raising_at
from transformers import AutoModelForCausalLM

import coachhook_plugin.target
from coachhook_plugin import EditSession, load_edits
from coachhook_plugin.cli import main
from coachhook_plugin.cli.facts import Fact, batches, outstanding
from coachhook_plugin.cli.main import _loaded
from coachhook_plugin.ledger import lines_of_batch
from coachhook_plugin.tokens import Request


@pytest.fixture
def work(tmp_path: Path, tiny: Any, tokenizer: Any, settings: Any) -> Path:
    """A folder with a model, hyperparameters for it and a file of facts."""
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    hparams = settings(v_num_grad_steps=2).to_dict()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**hparams, "device": "cpu"}))
    write(tmp_path, zoo.FACTS)
    return tmp_path


def write(work: Path, facts: list[Any]) -> None:
    lines = [fact if isinstance(fact, str) else json.dumps(fact) for fact in facts]
    (work / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def run(work: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """`run("inspect", "edits")`: exit code, and the JSON that was printed."""

    def made(*arguments: str) -> tuple[int, Any]:
        code = main([*arguments, "--json", "--quiet"])
        return code, json.loads(capsys.readouterr().out)

    return made


def edit(work: Path, *more: str) -> list[str]:
    given = ["edit", str(work / "facts.jsonl"), "--model", str(work / "model"), "--hparams", str(work / "tiny.yaml")]
    return [*given, "--out", str(work / "edits"), "--batch-size", "2", *more]


def test_facts_become_edits_that_are_looked_at_taken_back_and_used(work: Path, run: Any, tiny: Any) -> None:
    edits = str(work / "edits")
    code, answer = run(*edit(work))
    assert code == 0
    assert answer["written"] == ["1-1", "1-2", "2-1", "2-2"]
    assert (answer["in_force"], answer["step"], answer["skipped"]) == (4, 2, 0)

    code, answer = run("inspect", edits)
    assert code == 0
    assert (answer["in_force"], answer["step"], answer["rollback_from"]) == (4, 2, 0)
    assert answer["base_model"] == "model"
    assert all((work / "edits" / name).stat().st_size == size for name, size in answer["files"].items())

    code, answer = run("show", edits, "lovelace")
    assert code == 0
    assert [line["id"] for line in answer["edits"]] == ["2-2"]
    assert run("show", edits, "2-2")[1] == answer

    code, answer = run("forget", edits, "1-2")
    assert (code, answer["in_force"], answer["step"], answer["forgotten"]) == (0, 3, 3, ["1-2"])
    code, answer = run("stats", edits)
    assert answer["edits"] == {"in force": 3, "forgotten": 1}
    assert answer["bytes_for_answers"] > 0

    code, answer = run("rollback", edits, "--to", "1")
    assert (code, answer["in_force"], answer["step"]) == (0, 2, 1)

    session = load_edits(tiny(), edits)
    assert [line.id for line in session.ledger] == ["1-1", "1-2"]
    code, answer = run("generate", edits, zoo.FACTS[0]["prompt"], "--max-new-tokens", "3")
    assert code == 0
    assert set(answer) == {"prompt", "edited", "base"}


def test_editing_goes_on_where_it_was_and_skips_what_is_in_force(work: Path, run: Any) -> None:
    write(work, zoo.FACTS[:2])
    assert run(*edit(work))[0] == 0
    changed = {**zoo.FACTS[1], "target_new": "Seoul"}
    write(work, [zoo.FACTS[0], changed, *zoo.FACTS[2:]])
    code, answer = run(*edit(work))
    assert code == 1
    assert "--resume goes on there" in answer["error"]
    code, answer = run(*edit(work, "--resume"))
    assert code == 0
    assert (answer["skipped"], answer["superseded"], answer["in_force"]) == (1, ["1-2"], 4)


def test_resuming_needs_no_hyperparameters_and_refuses_others_than_those_of_the_folder(work: Path, run: Any) -> None:
    write(work, zoo.FACTS[:1])
    assert run(*edit(work))[0] == 0
    write(work, zoo.FACTS[:2])
    other = yaml.safe_load((work / "tiny.yaml").read_text()) | {"v_lr": 0.25, "batch_size": 7}
    (work / "other.yaml").write_text(yaml.safe_dump(other))
    bare = [
        "edit",
        str(work / "facts.jsonl"),
        "--model",
        str(work / "model"),
        "--out",
        str(work / "edits"),
        "--resume",
    ]
    for given, said in (
        (["--hparams", str(work / "other.yaml")], "v_lr: 0.5 in force, 0.25 given"),
        (["--dtype", "bfloat16"], "dtype: float32 in force, bfloat16 given"),
    ):
        code, answer = run(*bare, *given)
        assert code == 1
        assert said in answer["error"]
        assert "batch_size" not in answer["error"]  # which may differ
        assert "leave --hparams and --dtype away" in answer["error"]
    assert run("inspect", str(work / "edits"))[1]["in_force"] == 1
    code, answer = run(*bare, "--dtype", "float32")
    assert (code, answer.get("in_force")) == (0, 2), answer


def test_a_fact_that_fails_while_it_is_written_is_named_by_its_line(
    work: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(work, [zoo.FACTS[0], "", zoo.FACTS[1], "", "", *zoo.FACTS[2:]])
    original, calls = coachhook_plugin.target._solve, []

    def failing(model: Any, parts: Any, problem: Any, names: Any, *args: Any) -> Any:
        calls.append(names)
        if len(calls) == 2:
            raise ValueError(f"{names[0]}: the objective is nan")
        return original(model, parts, problem, names, *args)

    monkeypatch.setattr(coachhook_plugin.target, "_solve", failing)
    code, answer = run(*edit(work))
    assert code == 1
    assert answer["error"].startswith(f"{work / 'facts.jsonl'}, line 6 ('{zoo.FACTS[2]['prompt']}'): the objective")
    assert run("inspect", str(work / "edits"))[1]["in_force"] == 2


@pytest.mark.once
def test_a_subject_outside_the_scope_is_told_by_its_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = {"prompt": "The best dish", "subject": "The", "target_new": "Rome"}  # as every other first "The"
    write(work, [zoo.FACTS[0], "", "", hidden])
    hparams = yaml.safe_load((work / "tiny.yaml").read_text()) | {"scope_budget": 0.001}
    (work / "tiny.yaml").write_text(yaml.safe_dump(hparams))
    program = f"import sys; from coachhook_plugin.cli import main; sys.exit(main({edit(work, '--quiet')!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\nline 4, subject: 'The' lies outside" in f"\n{done.stderr}"
    for command, said in (
        (["show", str(work / "edits"), "best dish"], "[in force, outside the scope when edited; NLL"),
        (["stats", str(work / "edits")], " outside the scope when edited; NLL"),
    ):
        assert main(command) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("scope", ["leverage", "zscore"])
def test_the_threshold_is_todays_and_not_that_of_the_last_edit(
    work: Path, run: Any, tiny: Any, tokenizer: Any, scope: str
) -> None:
    hparams = yaml.safe_load((work / "tiny.yaml").read_text()) | {"scope": scope}
    (work / "tiny.yaml").write_text(yaml.safe_dump(hparams))
    edits = str(work / "edits")
    assert run(*edit(work))[0] == 0
    assert run("forget", edits, "1-1", "2-1")[0] == 0
    session = load_edits(tiny(), edits, tokenizer)
    now = session._scope.asked(session.state.scope)
    assert run("stats", edits)[1]["threshold"] == now
    if scope == "leverage":
        assert now != session.ledger[-1].threshold
    session.save(work / "bare", memory=False)
    assert run("stats", str(work / "bare"))[1]["threshold"] == pytest.approx(now, rel=1e-6)
    session.rollback(to=0)
    session.save(work / "bare")
    assert run("stats", str(work / "bare"))[1]["threshold"] == (None if scope == "leverage" else hparams["alpha"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{not json"], "line 1: not JSON"),
        ([zoo.FACTS[0], "[" * 100_000], "line 2: not JSON"),
        ([zoo.FACTS[0], "", '["a list"]'], "line 3: expected an object with prompt, subject and target_new"),
        ([zoo.FACTS[0], {"prompt": "Ada is", "subject": "Ada"}], "line 2, field 'target_new' is missing"),
        ([{**zoo.FACTS[0], "subject": "Nobody"}], "line 1, subject: 'Nobody' is not in the prompt"),
        ([{**zoo.FACTS[0], "target_new": "half \ud83d"}], "line 1, target_new: 'half \\ud83d' holds half a character"),
        ([zoo.FACTS[0], {**zoo.FACTS[1], "target_new": 7}], "line 2, target_new: expected a string"),
        ([zoo.FACTS[0], {**zoo.FACTS[2], "prompt": "Norway " + "so they say " * 80}], "line 2, prompt: "),
        ([], "holds no facts"),
    ],
)
def test_a_faulty_line_is_named_by_its_number_and_nothing_is_written(
    work: Path, run: Any, lines: list[Any], said: str
) -> None:
    write(work, lines)
    code, answer = run(*edit(work))
    assert code == 2
    assert said in answer["error"]
    assert not (work / "edits" / "coachhook_config.json").exists()
    write(work, zoo.FACTS[:1])
    assert run(*edit(work))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nowhere"], "holds no edits"),
        (["stats", "nowhere"], "holds no edits"),
        (["show", "edits", "Nobody"], "no edit has the id 'Nobody'"),
        (["rollback", "edits", "--to", "9"], "can return to steps 0 to 1"),
        (["forget", "edits", "7-7"], "no edit '7-7'"),
        (["forget", "edits", "1-1", "--model", "other"], "other weights"),
    ],
)
def test_what_is_not_possible_ends_in_one_sentence_and_exit_code_1(
    work: Path, run: Any, tiny: Any, tokenizer: Any, capsys: Any, arguments: list[str], said: str
) -> None:
    write(work, zoo.FACTS[:1])
    assert run(*edit(work))[0] == 0
    tiny(seed=1).save_pretrained(work / "other")
    tokenizer.save_pretrained(work / "other")
    arguments = [str(work / a) if a in ("edits", "nowhere", "other") else a for a in arguments]
    code, answer = run(*arguments)
    assert code == 1
    assert said in answer["error"]
    assert main([*arguments, "--quiet"]) == 1  # and without --json
    assert said in capsys.readouterr().err
    assert run("inspect", str(work / "edits"))[1]["in_force"] == 1


def test_a_fact_may_hold_any_separator_of_unicode_and_the_file_a_mark_at_its_start(work: Path, run: Any) -> None:
    fact = {**zoo.FACTS[0], "prompt": "So\u2028they\x85say: " + zoo.FACTS[0]["prompt"]}
    line = json.dumps(fact, ensure_ascii=False)
    (work / "facts.jsonl").write_text("\ufeff" + line + "\r\n", encoding="utf-8", newline="")
    assert run(*edit(work))[1]["written"] == ["1-1"]
    assert run("show", str(work / "edits"), "1-1")[1]["edits"][0]["prompt"] == fact["prompt"]


def test_a_folder_that_comes_from_elsewhere_is_used_with_a_model_by_shipped_name(
    work: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*edit(work))[0] == 0
    (work / "model").rename(work / "here")
    monkeypatch.setattr("coachhook_plugin.smollm2.smollm2_path", lambda: str(work / "here"))
    code, answer = run("forget", str(work / "edits"), "1-1", "--model", "smollm2-135m")
    assert (code, answer.get("in_force")) == (0, 3), answer


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there_is_named(work: Path, run: Any, device: str) -> None:
    code, answer = run(*edit(work, "--device", device))
    assert code == 1
    assert f"device: {device} cannot be used" in answer["error"]


def test_a_model_in_16_bits_is_the_one_that_transformers_loads(work: Path) -> None:
    """`.to(dtype)` would round the rotary frequencies, which transformers keeps in 32 bits."""
    expected = AutoModelForCausalLM.from_pretrained(work / "model", torch_dtype=torch.bfloat16)
    found, _ = _loaded(str(work / "model"), "bfloat16", None)
    for one, other in (
        (found.named_parameters(), expected.named_parameters()),
        (found.named_buffers(), expected.named_buffers()),
    ):
        told, wanted = dict(one), dict(other)
        assert told.keys() == wanted.keys()
        assert all(told[name].dtype == wanted[name].dtype for name in wanted)
        assert all(torch.equal(told[name], wanted[name]) for name in wanted)
    assert found.model.rotary_emb.inv_freq.dtype == torch.float32
    assert found.lm_head.weight.dtype == torch.bfloat16


def test_the_hyperparameters_choose_the_dtype_unless_the_command_does(work: Path, run: Any) -> None:
    hparams = yaml.safe_load((work / "tiny.yaml").read_text())
    write(work, zoo.FACTS[:1])
    for fp16, given, expected in (
        (True, [], "float16"),
        (True, ["--dtype", "bfloat16"], "bfloat16"),
        (False, [], "float32"),
    ):
        (work / "tiny.yaml").write_text(yaml.safe_dump({**hparams, "fp16": fp16}))
        code, answer = run(*edit(work, *given))
        assert code == 0, answer
        assert run("inspect", str(work / "edits"))[1]["dtype"] == expected
        shutil.rmtree(work / "edits")


def test_a_model_spread_over_devices_is_refused_unless_one_is_named(work: Path, run: Any) -> None:
    hparams = yaml.safe_load((work / "tiny.yaml").read_text())
    (work / "tiny.yaml").write_text(yaml.safe_dump({**hparams, "model_parallel": True}))
    write(work, zoo.FACTS[:1])
    code, answer = run(*edit(work))
    assert code == 1
    assert "model_parallel: is true" in answer["error"]
    assert "--device" in answer["error"]
    assert not (work / "edits").exists()
    assert run(*edit(work, "--device", "cpu"))[0] == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand more"), "less is needed"),
        (MemoryError(), "(MemoryError); with a smaller --batch-size"),
        (RuntimeError("shapes cannot be multiplied"), "(shapes cannot be multiplied)"),
        (RecursionError("maximum recursion depth exceeded"), "(maximum recursion depth exceeded)"),
    ],
    ids=["cuda", "cpu", "shapes", "recursion"],
)
def test_what_breaks_off_inside_pytorch_is_told_in_one_sentence_and_keeps_whole_batches(
    work: Path, run: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    with monkeypatch.context() as patch, raising_at(patch, coachhook_plugin.target, "_solve", 1, error):
        code, answer = run(*edit(work))
    assert code == 1
    assert "\n" not in answer["error"]
    assert said in answer["error"]
    assert "whole batches are kept" in answer["error"]
    assert run("inspect", str(work / "edits"))[1]["in_force"] == 2


def test_an_interrupted_run_keeps_its_whole_batches(work: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = EditSession.edit, []

    def interrupted(self: EditSession, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(EditSession, "edit", interrupted)
        assert run(*edit(work))[0] == 130
    assert run("inspect", str(work / "edits"))[1]["in_force"] == 2
    code, answer = run(*edit(work, "--resume"))
    assert (code, answer["skipped"], answer["in_force"]) == (0, 2, 4)


def test_people_are_answered_in_sentences(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edits = str(work / "edits")
    assert main(edit(work, "--quiet")) == 0
    assert "4 facts written" in capsys.readouterr().out
    for arguments, said in (
        (["inspect", edits], "4 in force, step 2"),
        (["show", edits, "Darrieux"], "1-1     The mother tongue of Danielle Darrieux is -> English  [in force"),
        (["stats", edits], "edits: 4 in force"),
        (["generate", edits, "The Eiffel Tower stands in"], "edited: The Eiffel Tower"),
        (["forget", edits, "1-1", "--quiet"], "3 edits in force, step 3"),
        (["rollback", edits, "--to", "2", "--quiet"], "4 edits in force, step 2"),
    ):
        assert main(arguments) == 0
        assert said in capsys.readouterr().out


def test_help_shows_examples_and_wrong_usage_ends_in_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "coachhook edit facts.jsonl --model" in capsys.readouterr().out
    for arguments in (
        [],
        ["edit"],
        ["rollback", "x"],
        ["edit", "x", "--model", "m", "--out", "o", "--batch-size", "0"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


def test_a_change_of_mind_never_shares_a_batch() -> None:
    facts = [Fact(i, Request("Ada is", "Ada", target)) for i, target in enumerate(["a", "a", "b", "b", "c"], 1)]
    assert [[fact.line for fact in batch] for batch in batches(facts, 3)] == [[1, 2], [3, 4], [5]]
    assert [[fact.line for fact in batch] for batch in batches(facts[:2], 1)] == [[1], [2]]


def test_where_a_model_lies_is_remembered_here_and_asked_for_elsewhere(
    work: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*edit(work))[0] == 0
    assert not any(str(work).encode() in path.read_bytes() for path in (work / "edits").rglob("*") if path.is_file())
    edits = str(work / "edits")
    assert run("rollback", edits, "--to", "1")[1]["in_force"] == 2
    monkeypatch.setenv("COACHHOOK_CACHE", str(work / "elsewhere"))
    monkeypatch.chdir(work / "edits")

    def nowhere(name: str, **_: Any) -> Any:  # without asking a hub, which takes a minute where there is none
        raise OSError(f"{name} is no model\nof anybody's")

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", nowhere)
        code, answer = run("forget", edits, "1-1")
    assert code == 1
    assert answer["error"].startswith("model: no base model of these edits")
    assert answer["error"].endswith("name it with --model")
    assert "\n" not in answer["error"]
    assert run("forget", edits, "1-1", "--model", str(work / "model"))[1]["in_force"] == 1


def test_the_place_of_the_memories_is_chosen_anew_by_whoever_goes_on(work: Path, run: Any) -> None:
    def place() -> str:
        return json.loads((work / "edits" / "coachhook_config.json").read_text())["hparams"]["memory_device"]

    write(work, zoo.FACTS[:2])
    assert run(*edit(work, "--memory-device", "cpu"))[0] == 0
    assert place() == "cpu"
    write(work, zoo.FACTS[:3])
    hparams = yaml.safe_load((work / "tiny.yaml").read_text()) | {"memory_device": "disk"}
    (work / "tiny.yaml").write_text(yaml.safe_dump(hparams))
    assert run(*edit(work, "--resume"))[1]["in_force"] == 3
    assert place() == "disk"
    write(work, zoo.FACTS)
    assert run(*edit(work, "--resume", "--memory-device", "cpu"))[1]["in_force"] == 4
    assert place() == "cpu"
    assert run("forget", str(work / "edits"), "1-1", "--memory-device", "weights")[1]["in_force"] == 3


def test_a_change_of_mind_in_the_file_is_not_reversed_by_going_on(work: Path, run: Any) -> None:
    changed = [{**zoo.FACTS[0], "target_new": target} for target in ("English", "Rome", "Berlin")]
    write(work, [changed[0], zoo.FACTS[1], changed[1]])
    assert run(*edit(work))[1]["superseded"] == ["1-1"]
    for _ in range(2):
        code, answer = run(*edit(work, "--resume"))
        assert (code, answer["written"], answer["skipped"], answer["step"]) == (0, [], 3, 2)
    write(work, [*changed, zoo.FACTS[1]])
    code, answer = run(*edit(work, "--resume"))
    assert (code, answer["written"], answer["superseded"]) == (0, ["3-1"], ["2-1"])
    assert run("show", str(work / "edits"), "3-1")[1]["edits"][0]["target_new"] == "Berlin"


@pytest.mark.parametrize(
    ("in_force", "expected"), [("", [1, 2, 3, 4]), ("a", []), ("b", [3, 4]), ("d", [1, 2, 3, 4])], ids=str
)
def test_of_several_targets_those_after_the_one_in_force_are_outstanding(in_force: str, expected: list[int]) -> None:
    facts = [Fact(i, Request("Ada is", "Ada", target)) for i, target in enumerate(["a", "b", "c", "a"], 1)]
    lines = lines_of_batch((), 1, "", [Request("Ada is", "Ada", in_force)], [0.0], None, [True])
    assert [fact.line for fact in outstanding(facts, lines if in_force else ())] == expected
