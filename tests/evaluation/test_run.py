"""The command itself, on a tiny model: a sweep side by side, one that is killed, and what a user sees of errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
import zoo
from conftest import lessons
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from evaluation.journal import DONE, FAILED, LOCK, read_lines
from evaluation.leaderboard.jobs import load_jobs, unfinished
from evaluation.leaderboard.rows import UNEDITED
from evaluation.run import CONF, IN_USE, emptied, job_folder, key, resolved, run_job, shareable

ROOT = Path(__file__).parents[2]
TIMES = ("seconds_per_edit", "forward_overhead", "peak_megabytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny model in a folder, its hyperparameters, and records."""
    folder = tmp_path_factory.mktemp("run")
    model = zoo.model("llama", len(tokenizer))
    model.save_pretrained(folder / "tiny-llama")
    tokenizer.save_pretrained(folder / "tiny-llama")
    (folder / "text.txt").write_text(zoo.TEXT, encoding="utf-8")
    settings = zoo.hparams(folder / "text.txt", layers=[1, 2], scope_budget=0.05, v_num_grad_steps=2).to_dict()
    settings |= {"model_name": str(folder / "tiny-llama"), "device": "cpu"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    memit = yaml.safe_load((ROOT / "hparams/MEMIT/smollm2-135m.yaml").read_text(encoding="utf-8"))
    memit |= {"model_name": settings["model_name"], "layers": [1, 2], "v_loss_layer": 3, "v_num_grad_steps": 2}
    (folder / "memit.yaml").write_text(yaml.safe_dump({**memit, "lm_head_module": "lm_head"}), encoding="utf-8")
    facts = [
        {
            **fact,
            "case_id": i,
            "ground_truth": "Seoul",
            "rephrase_prompt": f"They say: {fact['prompt']}",
            "locality_prompt": "The best dish comes from",
            "locality_ground_truth": "Norway",
        }
        for i, fact in enumerate(lessons(1))
    ]
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def wishes(place: Path, run: str, *more: str, hparams: str = "tiny.yaml") -> list[str]:
    """The command line after the module's name."""
    return [
        f"run={run}",
        f"out={place / 'results'}",
        "dataset=counterfact",
        f"dataset.path={place / 'facts.json'}",
        f"method.hparams={place / hparams}",
        f"model.statistics={place / 'tiny.yaml'}",
        f"held_text={place / 'text.txt'}",
        "metrics.held_tokens=200",
        "metrics.new_tokens=3",
        "threads=1",
        *more,
    ]


def start(place: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "EASYEDIT_HOME"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "evaluation.run", *arguments],
        cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, out[-2000:] + error[-4000:]
    return out


def board(place: Path, run: str) -> list[dict[str, Any]]:
    """The rows of methods; one more tells what they began with."""
    found: list[dict[str, Any]] = json.loads((place / "results" / run / "leaderboard.json").read_text())
    methods = [row for row in found if row["method"] != UNEDITED]
    assert 0 < len(found) - len(methods) <= len({row["protocol"] for row in methods})
    return methods


STEPS = ("edits=8", "batch_size=1", "protocol.every=1")


@pytest.fixture(scope="module")
def sweep(place: Path) -> Path:
    """Two variants side by side in processes of joblib."""
    pytest.importorskip("easyeditor")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    two = ("-m", "method=coachhook,coachhook-dynamic-alpha", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    told = finished(start(place, [*two, *wishes(place, "sweep", *STEPS)]))
    assert "CoachHooK, dynamic alpha" in told
    return place / "results" / "sweep"


@pytest.mark.slow
def test_a_sweep_compares_its_methods_in_one_leaderboard(sweep: Path, place: Path) -> None:
    rows = board(place, "sweep")
    assert {row["method"] for row in rows} == {"CoachHooK", "CoachHooK, dynamic alpha"}
    assert all((row["edits"], row["batch_size"], row["dataset"]) == (8, 1, "counterfact") for row in rows)
    assert all(0 <= row["reliability"] <= 1 and row["reliability_interval"] for row in rows)
    assert all(row["forward_overhead"] > 0 for row in rows)  # measured
    for job in load_jobs(sweep):
        assert sorted(job.steps) == list(range(1, 9))
        assert job.about["data"]["sha256"]
        assert job.about["seed"] == 0
        assert job.about["versions"]["torch"]
        assert job.config["hparams"]["layers"] == [1, 2]
        assert not (job.folder / "state.pt").exists()
        # Results may be shared: they do not tell where things lie on this machine.
        assert str(place) not in (job.folder / "config.yaml").read_text()
    assert (sweep / "retention.svg").is_file()


@pytest.mark.slow
def test_a_killed_run_gives_the_same_leaderboard(sweep: Path, place: Path) -> None:
    arguments = wishes(place, "killed", *STEPS)
    jobs = place / "results" / "killed" / "jobs"
    kill_after(2, start(place, arguments), jobs)
    assert not list(jobs.glob("*/done.json")), "it was over before it could be killed"
    finished(start(place, arguments))
    (found,) = board(place, "killed")
    (expected,) = [row for row in board(place, "sweep") if row["method"] == "CoachHooK"]
    for name, value in expected.items():
        if not name.removesuffix("_interval").startswith(TIMES):
            assert found[name] == value, name
    (job,) = load_jobs(place / "results" / "killed")
    (whole,) = [job for job in load_jobs(sweep) if job.config["method"]["label"] == "CoachHooK"]
    for name in ("before", *(f"after-{step:06d}" for step in range(1, 9))):
        assert job.journal.phase(name).rows == whole.journal.phase(name).rows  # type: ignore[union-attr]


def kill_after(batches: int, process: subprocess.Popen[str], jobs: Path) -> None:
    """Kill the command when a job has so many batches, and wait until nobody holds its output any more: the processes
    in which methods run, and those of a launcher, end as well."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(len(read_lines(path)) >= batches for path in jobs.glob("*/batches.jsonl")):
            break
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.slow
def test_a_killed_sweep_leaves_nothing_that_computes_on_or_begins_what_is_left_of_it(place: Path) -> None:
    """joblib's processes outlive a killed command and would take the next combination."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = ("-m", "seed=0,1,2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    jobs = place / "results" / "torn" / "jobs"
    kill_after(1, start(place, [*sweep, *wishes(place, "torn", *STEPS)]), jobs)
    assert 1 <= len(list(jobs.iterdir())) <= 2
    assert not list(jobs.glob(f"*/{DONE}"))


@pytest.mark.slow
def test_a_method_of_the_toolkit_runs_under_our_protocol_and_its_own(place: Path) -> None:
    pytest.importorskip("easyeditor")
    both = ("-m", "protocol=consecutive,batch_edit", "method=memit", "edits=4", "batch_size=2")
    told = finished(start(place, [*both, *wishes(place, "memit", hparams="memit.yaml")]))
    assert "MEMIT" in told
    rows = {row["protocol"]: row for row in board(place, "memit")}
    jobs = {job.config["protocol"]["name"]: job for job in load_jobs(place / "results" / "memit")}
    assert all((row["edits"], row["batch_size"]) == (4, 2) for row in rows.values())
    assert rows["consecutive"]["kept_megabytes"] == 2 * 48**2 * 4 / 2**20  # C0 of two layers in float32, and no edits
    assert rows["consecutive"]["forward_overhead"] > 0  # measured
    found = jobs["batch_edit"].toolkit
    assert found is not None
    assert rows["batch_edit"]["reliability"] == pytest.approx(sum(m["post"]["rewrite_acc"][0] for m in found) / 4)
    assert 0 <= rows["batch_edit"]["locality"] <= 1
    assert rows["batch_edit"]["seconds_per_edit"] > 0
    # Our run in the toolkit's shape tells its `summary_metrics` what our row says.
    shaped = json.loads((jobs["consecutive"].folder / "toolkit.json").read_text())
    assert {"case_id", "requested_rewrite", "time", "pre", "post"} == set(shaped[0])
    assert rows["consecutive"]["reliability"] == pytest.approx(sum(m["post"]["rewrite_acc"][0] for m in shaped) / 4)
    if os.environ.get("EASYEDIT_HOME"):  # the release has no such function
        summarise = """
            import importlib, json, sys
            from coachhook_plugin.toolkit import import_easyeditor
            import_easyeditor()
            for path in sys.argv[1:]:
                importlib.import_module("easyeditor.editors.utils").summary_metrics(json.load(open(path)))
        """
        paths = [str(job.folder / "toolkit.json") for job in jobs.values()]
        command = [sys.executable, "-c", textwrap.dedent(summarise), *paths]
        told = subprocess.run(
            command, check=True, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        ).stdout
        assert told.count("Metrics Summary") == 2


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolved(compose("config", overrides=list(overrides)))


def test_jobs_differ_by_what_changes_a_figure_and_by_nothing_else(tmp_path: Path) -> None:
    base = composed("edits=4")
    free = ("run=other", "threads=2", "snapshots=0", f"out={tmp_path}", "metrics.forward_repeats=3")
    assert key(base) == key(composed("edits=4", *free))
    changes = ("edits=5", "seed=1", "batch_size=2", "protocol=single", "method=coachhook-paper", "model.device=cuda")
    for change in (*changes, "+method.overrides.v_num_grad_steps=3", "metrics.new_tokens=3"):
        assert key(base) != key(composed("edits=4", change)), change
    assert job_folder(base).parent == Path("results/board/jobs")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("protocol.every=-1", "protocol.every is -1"),
        ("protocol.evaluate_at=[2,5]", "from 1 to 4"),
        ("protocol.every=0", "or null"),
        ("+method.overrides.lamda=3", "has no lamda to change"),
    ],
)
def test_what_cannot_be_run_is_told_before_hours_of_editing(wrong: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        composed("edits=4", wrong)


def test_steps_may_be_left_out_by_null() -> None:
    assert composed("edits=4", "protocol.evaluate_at=null")["protocol"]["evaluate_at"] is None


def test_key_scores_are_refused_for_other_methods_before_their_edits() -> None:
    composed("protocol.key_scores=true")
    with pytest.raises(ValueError, match=r"for CoachHooK; MEMIT has no hook layers"):
        composed("method=memit", "protocol.key_scores=true")


def test_the_same_file_in_another_place_is_the_same_job(tmp_path: Path) -> None:
    names = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "set.json"
        path.write_text(json.dumps([{"prompt": "Rome is in", "subject": "Rome", "target_new": "Spain"}]))
        names.append(key(composed("dataset=counterfact", f"dataset.path={path}", "edits=1")))
    assert names[0] == names[1]


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "experiment").glob("*.yaml")])
def test_every_analysis_can_be_composed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"prompt": "Rome is in", "subject": "Rome", "target_new": "Spain"}] * 1200))
    given = ["dataset=file", f"dataset.path={path}"] if name.startswith("leaderboard") else []
    run = composed(f"experiment={name}", *given)["run"]
    assert re.fullmatch(rf"{run}(-\d+)?", name)  # the two parts of the leaderboard share one
    told = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    swept = told.get("hydra", {}).get("sweeper", {}).get("params", {})
    for override in OverridesParser.create().parse_overrides([f"{of}={values}" for of, values in swept.items()]):
        for value in override.sweep_string_iterator():
            composed(f"experiment={name}", *given, f"{override.get_key_element()}={value}")


def test_everything_that_cannot_be_run_is_told_in_a_sentence_each(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("alg_name: [")
    given = ["dataset=zsre,counterfact", "method.hparams=null,broken.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.run", "-m", f"out={tmp_path}", "run=x", *given],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = sorted(line for line in done.stderr.splitlines() if "did not finish" in line)
    assert len(lines) == 4
    assert all(sum(f"dataset-{name}" in line for line in lines) == 2 for name in ("zsre", "counterfact"))
    for line in lines:  # hyperparameters are read before the data set
        expected = "ParserError: while parsing" if "broken" in line else "dataset.path is not set"
        assert f": {expected}" in line
    assert len(unfinished(tmp_path / "x")) == 4


def test_what_another_process_is_writing_is_not_forgotten(tmp_path: Path) -> None:
    """`again=true` would mix two runs in one folder."""
    told = composed("edits=4", f"out={tmp_path}", "again=true")
    folder = job_folder(told)
    (folder / "phases").mkdir(parents=True)
    (folder / "phases" / "before.jsonl").write_text("{}")
    with FileLock(folder / LOCK):
        run_job(told)
    assert (folder / "phases" / "before.jsonl").is_file()
    assert (folder / FAILED).read_text() == f"{IN_USE}\n"
    assert emptied(folder)
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_job_that_is_killed_while_it_is_forgotten_is_not_taken_for_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "phases").mkdir()
    (tmp_path / DONE).write_text("{}")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        emptied(tmp_path)
    assert not (tmp_path / DONE).exists()


def test_the_method_inside_another_one_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    shipped = composed("method=simie")
    assert shipped["base_hparams"]["v_lr"] == 0.5
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**shipped["base_hparams"], "v_lr": 0.25}))
    mine = composed("method=simie", f"method.base_hparams={tmp_path / 'mine.yaml'}")
    assert mine["base_hparams"]["v_lr"] == 0.25
    assert key(mine) != key(shipped)


def test_a_text_that_statistics_are_made_from_counts_by_its_content(tmp_path: Path) -> None:
    text, shared = tmp_path / "text.txt", tmp_path / "shared.yaml"
    shared.write_text(f"alg_name: CoachHooK\nmom2_dataset: {text}\n")
    keys = []
    for content in ("one", "two", "one"):
        text.write_text(content)
        for given in (f"+method.overrides.mom2_dataset={text}", f"model.statistics={shared}"):
            keys.append(key(composed("edits=4", given)))
    assert keys[:2] == keys[4:]
    assert len(set(keys)) == 4


@pytest.mark.parametrize(("method", "given"), [
    ("coachhook", "+method.overrides.mom2_dataset={}/text.txt"),
    ("coachhook", "+method.overrides.stats_dir={}"),
    ("simie", "method.base_hparams={}/mine.yaml"),
])  # fmt: skip
def test_what_statistics_are_made_from_is_the_same_wherever_it_lies(method: str, given: str, tmp_path: Path) -> None:
    inside = composed("method=simie")["base_hparams"]
    found = []
    for place in (tmp_path / "a" / "of_mine", tmp_path / "b" / "of_mine"):
        place.mkdir(parents=True)
        (place / "text.txt").write_text("one")
        inside |= {"mom2_dataset": str(place / "text.txt"), "stats_dir": str(place)}
        (place / "mine.yaml").write_text(yaml.safe_dump(inside))
        found.append(composed(f"method={method}", given.format(place)))
        assert str(tmp_path) not in yaml.safe_dump(shareable({**found[-1], "out": ""}))
    assert key(found[0]) == key(found[1])
    (tmp_path / "b" / "of_mine" / "text.txt").write_text("two")
    if "stats_dir" not in given:
        assert key(found[0]) != key(composed(f"method={method}", given.format(tmp_path / "b" / "of_mine")))
