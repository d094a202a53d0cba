"""What a reader of the leaderboard sees is what the jobs measured, in every form it has."""

from __future__ import annotations

import csv
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.data import HELD_TEXT, Probe, Record
from evaluation.journal import ABOUT, CONFIG, DONE, RECORDS, TOOLKIT, Folder, Phase
from evaluation.leaderboard import COLUMNS, against, build, load_jobs, plots, publish, row_of
from evaluation.leaderboard.jobs import Job, mixed
from evaluation.leaderboard.page import embedded
from evaluation.leaderboard.rows import Row, model_name, told_apart

METHODS = Path(__file__).parents[2] / "evaluation" / "conf" / "method"
NASTY = '</script><script>document.title="broken"</script><!-- & "quoted" \u2028'
PROMISED = (
    "method", "dataset", "edits", "batch_size", "reliability", "generality", "locality", "portability",
    "free_generation", "perplexity_ratio", "seconds_per_edit",
)  # fmt: skip
RECORD_LIST = [
    Record(
        f"r{i}", f"Town {i} lies in", f"Town {i}", "Rome", "Paris",
        rephrases=(f"People find Town {i} in",),
        locality=(Probe("n", f"Village {i} lies in", "Oslo"),),
        portability=(Probe("hop", f"Who rules Town {i}?", NASTY if i == 1 else "Caesar"),),
    )
    for i in range(4)
]  # fmt: skip


def answer(right: bool) -> list[Any]:
    return [[7], [7 if right else 8], 0.1 if right else 2.0]


def row(i: int, learned: bool, kept: bool = True) -> dict[str, Any]:
    """Every answer of record i; token 9 where a neighbour changed."""
    said = [[7 if kept else 9], [7], 0.5]
    return {
        "case_id": f"r{i}",
        "prompt": [answer(learned)],
        "rephrases": [answer(learned)],
        "locality": [said],
        "portability": [answer(False)],
        "prompt_rivals": [[[7], [6], 1.0]],
        "rephrase_rivals": [[[7], [6], 1.0]],
        "locality_rivals": [[[7], [6], 1.0]],
        "texts": {"prompt": ["Rome" if learned else "Paris"], "rephrases": ["Rome" if learned else NASTY],
                  "locality": ["Oslo" if kept else "Bergen"], "portability": ["Nobody"]},
        "generated": " Rome. Then" if learned else f" Paris {NASTY}",
    }  # fmt: skip


def job(folder: Path, label: str, learned: int, steps: tuple[int, ...] = (2, 4), **overrides: Any) -> None:
    """A finished consecutive job where the first `learned` records are learned and the last neighbour changes."""
    folder.mkdir(parents=True)
    config = {
        "seed": 0, "edits": 4, "batch_size": 2, "model": {"name": "tiny"},
        "dataset": {"name": "towns", "checksum": "c0ffee"}, "protocol": {"name": "consecutive"},
        "method": {"name": "m", "label": label, "overrides": overrides},
    }  # fmt: skip
    (folder / CONFIG).write_text(yaml.safe_dump(config))
    (folder / ABOUT).write_text("{}")
    (folder / RECORDS).write_text(json.dumps([asdict(record) for record in RECORD_LIST]))
    journal = Folder(folder)
    held = [[100.0, 50], [120.0, 50]]
    header = {"edits": 0, "held": held, "forward_seconds": [[0.3, 0.2], [0.2, 0.2]]}
    journal.keep(Phase("before", header, [row(i, False) for i in range(4)]))
    for step in steps:
        after = {**header, "edits": step, "held": [[loss + 50 * math.log(1.1), n] for loss, n in held]}
        rows = [row(i, i < learned, kept=i != 3) for i in range(step)]
        journal.keep(Phase(f"after-{step:06d}", after, rows))
    for number, seconds in enumerate((4.0, 6.0)):
        batch = {"batch": number, "edits": 2, "seconds": seconds, "kept_megabytes": 3.0, "peak_megabytes": 900.0}
        journal.keep_batch(batch, None)
    (folder / DONE).write_text(json.dumps({"batch_size": 2}))


@pytest.fixture
def board(tmp_path: Path) -> Path:
    job(tmp_path / "board/jobs/a", "Weak", 1)
    job(tmp_path / "board/jobs/b", "Strong", 4)
    job(tmp_path / "board/jobs/c", "Strong", 2, beta=3)
    (tmp_path / "board/jobs/d-unfinished").mkdir()
    build(tmp_path / "board")
    return tmp_path / "board"


def change(folder: Path, **parts: dict[str, Any]) -> None:
    """Change parts of a job's configuration."""
    config = yaml.safe_load((folder / CONFIG).read_text())
    changed = {name: {**config[name], **of} for name, of in parts.items()}
    (folder / CONFIG).write_text(yaml.safe_dump(config | changed))


def test_rows_of_one_name_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    """Or else a sweep over batch sizes is four equal lines in every table, plot and menu."""
    names = ("small", "large", "large-mine", "large-theirs-1f", "large-theirs-2e", "elsewhere")
    for name in names:
        job(tmp_path / name, "A", 1)
    for name, size in zip(names, (1, 2, 2, 2, 2, 1), strict=True):
        (tmp_path / name / DONE).write_text(json.dumps({"batch_size": size}))
    for name, file in (
        ("large-mine", "mine.yaml"),
        ("large-theirs-1f", "their.yaml"),
        ("large-theirs-2e", "their.yaml"),
    ):
        change(tmp_path / name, method={"file": file})
    change(tmp_path / "elsewhere", dataset={"skip": 4})
    jobs = [Job(tmp_path / name) for name in names]
    rows = told_apart([row_of(one) for one in jobs], jobs)
    assert [row.method for row in rows] == [
        "A, batches of 1",
        "A, batches of 2",
        "A, batches of 2, mine.yaml",
        "A, batches of 2, their.yaml, 1f",
        "A, batches of 2, their.yaml, 2e",
        "A",  # alone in its group
    ]
    assert rows[-1].title == "towns from record 5, 4 edits, consecutive, tiny"
    assert told_apart(rows[:1], jobs[:1]) == [replace(rows[0], method="A, batches of 1")]


def test_rows_made_with_different_programs_are_told(tmp_path: Path) -> None:
    made = ({"torch": "2.13.0", "numpy": "2"}, {"torch": "2.12.0", "numpy": "2"}, {"torch": "2.13.0"})
    for i, versions in enumerate(made):
        job(tmp_path / str(i), "A", 1)
        about = {"versions": versions, "toolkit_commit": None if i == 2 else "abc"}
        (tmp_path / str(i) / ABOUT).write_text(json.dumps(about))
    jobs = [Job(tmp_path / str(i)) for i in range(3)]
    assert mixed(jobs) == "torch 2.12.0 and 2.13.0"
    assert mixed([jobs[0], jobs[2]]) == ""
    old, new = ({"project_commit": letter * 40, "threads": 1, "device": "cpu"} for letter in "ab")
    (tmp_path / "0" / ABOUT).write_text(json.dumps({**new, "toolkit": "release", "earlier": [old]}))
    (tmp_path / "1" / ABOUT).write_text(
        json.dumps({**new, "toolkit": "checkout", "toolkit_commit": "c" * 40, "threads": 2})
    )
    jobs = [Job(tmp_path / str(i)) for i in range(2)]
    assert mixed(jobs[:1]) == "project aaaaaaa and bbbbbbb"
    assert mixed(jobs) == "toolkit ccccccc and release, project aaaaaaa and bbbbbbb, threads 1 and 2"
    many = [{**new, "project_commit": letter * 40, "processor": "x86"} for letter in "cdef"]
    (tmp_path / "0" / ABOUT).write_text(json.dumps({**new, "earlier": many}))
    told = mixed([Job(tmp_path / "0")])
    assert told == "5 values of project, processor unknown and x86"


def test_whoever_reads_the_leaderboard_learns_that_its_rows_were_not_made_alike(board: Path) -> None:
    for name in ("leaderboard.md", "leaderboard.html"):
        assert "made alike" not in (board / name).read_text()
    (board / "jobs/a" / ABOUT).write_text(json.dumps({"versions": {"torch": "<2>"}}))
    (board / "jobs/b" / ABOUT).write_text(json.dumps({"versions": {"torch": "3"}}))
    build(board)
    assert "Not all of these rows were made alike: torch 3 and <2>." in (board / "leaderboard.md").read_text()
    assert "Not all of these rows were made alike: torch 3 and &lt;2&gt;." in (board / "leaderboard.html").read_text()


def test_how_far_one_method_is_ahead_of_each_other_one_is_told_on_the_same_records(board: Path) -> None:
    means = {row.method: row.metrics["mean"][0] for row in build(board)}
    best, *others = (name for name in means if name != "unedited")
    lines = [line.split(" | ") for line in against(board, best).splitlines() if line.startswith("| ")]
    told = {line[0].removeprefix("| "): line[2] for line in lines[1:]}
    assert set(told) == set(others)
    for name in others:
        assert told[name].startswith(f"{means[best] - means[name]:.3f} (")
    assert against(board, others[0]).count(f"| {best} | {means[best]:.3f} | -") == 1
    with pytest.raises(ValueError, match=f"has no method 'C'; it has {best}"):
        against(board, "C")


def test_records_of_another_file_or_order_are_not_compared_with_these(tmp_path: Path) -> None:
    names = ("here", "other-file", "other-order")
    for name in names:
        job(tmp_path / "board/jobs" / name, "A", 1)
    change(tmp_path / "board/jobs/other-file", dataset={"checksum": "decaf" * 4})
    change(tmp_path / "board/jobs/other-order", dataset={"order": "spread"})
    rows = [row for row in build(tmp_path / "board") if row.method == "A"]
    assert len({row.group for row in rows}) == 3
    assert {row.title for row in rows} == {
        "towns c0ffee, 4 edits, consecutive, tiny",
        "towns decafdec, 4 edits, consecutive, tiny",
        "towns, 4 edits (spread), consecutive, tiny",
    }
    assert all(row.metrics["behind_first"] == (0, 0, 0) for row in rows)


def test_a_method_that_destroyed_its_model_does_not_take_the_other_rows_with_it(tmp_path: Path) -> None:
    """Its perplexity may be infinite, which JSON does not know."""
    for name in ("whole", "broken"):
        job(tmp_path / "board/jobs" / name, name, 1, steps=(4,))
    journal = Folder(tmp_path / "board/jobs/broken")
    phase = journal.phase("after-000004")
    assert phase is not None
    journal.keep(Phase(phase.name, {**phase.header, "held": [[1e6, 50], [1e6, 50]]}, phase.rows))
    build(tmp_path / "board")
    rows = {row["method"]: row for row in json.loads((tmp_path / "board" / "leaderboard.json").read_text())}
    assert rows["whole"]["perplexity_ratio"] == pytest.approx(1.1)
    assert rows["broken"]["perplexity_ratio"] is rows["broken"]["perplexity_ratio_interval"] is None
    assert rows["broken"]["reliability"] == 0.25
    assert math.isnan(Row.from_dict(rows["broken"]).metrics["perplexity_ratio"][0])
    assert "inf" in (tmp_path / "board" / "leaderboard.md").read_text()


def test_a_file_for_another_model_does_not_count_as_this_one() -> None:
    def told(name: str, path: str) -> str:
        return model_name({"model": {"name": name}, "hparams": {"model_name": path}})

    assert told("smollm2-135m", "smollm2-135m") == "smollm2-135m"
    assert told("llama3-8b", "./hugging_cache/llama-3-8b-instruct") == "llama3-8b"
    assert told("llama3-8b", "/models/llama-3-8b-instruct") == "llama3-8b"
    assert told("smollm2-135m", "/models/gpt2-xl") == "smollm2-135m (gpt2-xl)"
    assert told("mine", "/models/mine") == "mine"


def test_rows_hold_every_promised_figure_with_its_interval(board: Path) -> None:
    rows = json.loads((board / "leaderboard.json").read_text(), parse_constant=pytest.fail)
    assert [row["method"] for row in rows] == ["Strong", "Strong (beta=3)", "Weak", "unedited"]  # the best first
    for name in PROMISED:
        assert all(name in row for row in rows)
    *rows, unedited = rows
    for line in rows:
        for name in COLUMNS:
            low, high = line[f"{name}_interval"]
            assert low - 1e-9 <= line[name] <= high + 1e-9
    weak = rows[-1]
    assert (weak["reliability"], weak["generality"], weak["locality"], weak["portability"]) == (0.25, 0.25, 0.75, 0.0)
    assert weak["mean"] == pytest.approx((0.25 + 0.25 + 0.75) / 3)
    assert (weak["free_generation"], weak["ES"], weak["NS"], weak["NKP"]) == (0.25, 0.25, 1.0, 0.75)
    # The two miss the same neighbour, so only what Strong learned besides is between them.
    assert weak["behind_first"] == pytest.approx(2 * 0.75 / 3)
    assert (rows[0]["behind_first"], rows[0]["behind_first_interval"]) == (0, [0, 0])
    # Nothing learned and nothing changed: a third of the mean comes for free.
    assert [unedited[name] for name in ("reliability", "generality", "locality", "perplexity_ratio")] == [0, 0, 1, 1]
    assert unedited["mean"] == pytest.approx(1 / 3)
    assert unedited["behind_first"] == pytest.approx((1 + 1 - 0.25) / 3)
    assert unedited["seconds_per_edit"] is None
    assert weak["perplexity_ratio"] == pytest.approx(1.1)
    assert weak["forward_overhead"] == pytest.approx(0.5 / 0.4)
    assert (weak["seconds_per_edit"], weak["seconds_per_edit_interval"]) == (2.5, [2.0, 3.0])


def test_the_csv_and_the_text_say_what_the_json_says(board: Path) -> None:
    rows = json.loads((board / "leaderboard.json").read_text())
    with (board / "leaderboard.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    text = (board / "leaderboard.md").read_text()
    for line, of in zip(lines, rows, strict=True):
        assert line["method"] == of["method"]
        for name in PROMISED[4:]:
            if of[name] is None:
                assert [line[name], line[f"{name}_low"], line[f"{name}_high"]] == ["", "", ""]
                continue
            assert float(line[name]) == of[name]
            assert [float(line[f"{name}_low"]), float(line[f"{name}_high"])] == of[f"{name}_interval"]
        assert f"| {of['method']} | {of['batch_size'] or ''} | {of['reliability']:.3f} (" in text


def test_the_plots_are_there_in_both_forms(board: Path) -> None:
    for name in ("retention", "trade-off"):
        assert (board / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (board / f"{name}.svg").read_text()


def test_a_method_has_one_colour_and_marker_in_every_picture(board: Path) -> None:
    rows = [row for row in build(board) if row.method != "unedited"]
    named = [replace(row, method=name) for row, name in zip(rows, ("WISE", "CoachHooK (paper)", "Mine"), strict=True)]
    styles = plots._styles(named)
    for row in named[:2]:
        assert plots._styles([row])[row.method] == styles[row.method]
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == 3
    labels = {yaml.safe_load(path.read_text())["label"] for path in METHODS.glob("*.yaml")}
    assert {*plots.KNOWN, "${.name}"} == labels


def test_only_what_is_comparable_shares_a_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[tuple[str, int]]] = {}

    def look(figure: Any, path: Path) -> None:
        drawn[path.name] = [(axis.get_title(loc="left"), len(axis.lines)) for axis in figure.axes]
        save(figure, path)

    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", look)
    for name, label, edits in (("a", "Weak", 4), ("b", "Strong", 4), ("c", "Weak", 2)):
        folder = tmp_path / "board/jobs" / name
        job(folder, label, 1, steps=(1, 2, 4)[: edits // 2 + 1])
        told = yaml.safe_load((folder / CONFIG).read_text()) | {"edits": edits}
        (folder / CONFIG).write_text(yaml.safe_dump(told))
        before = Folder(folder).phase("before")
        assert before is not None
        Folder(folder).keep(replace(before, rows=before.rows[:edits]))
    build(tmp_path / "board")
    small, large = (f"towns, {edits} edits, consecutive, tiny" for edits in (2, 4))
    scores = [f"{name}, share of tokens" for name in ("reliability", "generality", "locality")]
    assert [title for title, _ in drawn["retention"]] == 2 * scores
    assert [lines for _, lines in drawn["retention"]] == [1, 1, 1, 2, 2, 2]
    assert [title.replace("\n", ", ") for title, _ in drawn["trade-off"]] == [small, large]


def test_the_same_jobs_give_the_same_files(board: Path) -> None:
    names = ("leaderboard.json", "leaderboard.csv", "leaderboard.md", "leaderboard.html", "retention.svg")
    before = {name: (board / name).read_bytes() for name in names}
    build(board)
    assert {name: (board / name).read_bytes() for name in names} == before


def test_results_of_the_toolkits_own_editor_become_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "board/jobs/a"
    job(folder, "Theirs", 1)
    shutil.rmtree(folder / "phases")
    post = {
        "rewrite_acc": [1.0],
        "rephrase_acc": [0.5],
        "locality": {"n_output": [[7]], "n_acc": [0.25]},
        "portability": {"hop_acc": [0.0]},
    }
    metrics = [{"case_id": f"r{i}", "pre": {}, "post": post, "time": 3.0} for i in range(4)]
    (folder / TOOLKIT).write_text(json.dumps(metrics))
    (found,) = build(tmp_path / "board")
    figures = [found.metrics[name][0] for name in ("reliability", "generality", "locality", "portability")]
    assert figures == [1.0, 0.5, 0.25, 0.0]
    assert found.metrics["seconds_per_edit"][0] == 1.5  # of a batch of two
    assert math.isnan(found.metrics["free_generation"][0])
    assert json.loads((tmp_path / "board/leaderboard.json").read_text())[0]["free_generation"] is None


def test_what_is_published_has_every_figure_and_nothing_of_the_data(board: Path, tmp_path: Path) -> None:
    """Or else a data set with terms of its own is given on with every result."""
    single = board / "jobs/single"
    job(single, "Single", 2, steps=())
    change(single, protocol={"name": "single"})
    journal = Folder(single)
    for number in (0, 1):
        rows = [row(i, i % 3 == 0) for i in (2 * number, 2 * number + 1)]
        journal.keep(Phase(f"batch-{number:06d}", {"edits": 2, "held": [[100.0, 50], [120.0, 50]]}, rows))
    theirs = board / "jobs/theirs"
    job(theirs, "Theirs", 1)
    shutil.rmtree(theirs / "phases")
    change(theirs, protocol={"name": "edit"})
    post = {"rewrite_acc": [1.0], "rephrase_acc": [0.5], "locality": {"n_acc": [0.25]}, "portability": {}}
    asked = {"prompt": "Town 0 lies in"}
    metrics = [{"requested_rewrite": asked, "case_id": f"r{i}", "post": post, "time": 3.0} for i in range(4)]
    (theirs / TOOLKIT).write_text(json.dumps(metrics))
    build(board)

    public = tmp_path / "public"
    assert publish(board, public) == publish(board, public) == 5
    assert [job.folder.name for job in load_jobs(public)] == ["a", "b", "c", "single", "theirs"]
    build(public)
    for name in ("leaderboard.json", "leaderboard.csv", "leaderboard.md"):
        assert (public / name).read_text() == (board / name).read_text()
    texts = "".join(path.read_text() for path in public.rglob("*.*") if path.suffix not in (".png", ".svg"))
    assert "record r2" in texts
    assert not any(part in texts for part in ("Town", "Village", "rules", "Caesar"))
    # Nor its answers, as the ids of their tokens: (said, wanted) was (7, 8), (7, 7), (9, 7) and (7, 6).
    rows = [Folder(public / "jobs/a").phase(name).rows[3] for name in ("before", "after-000004")]
    told = [[(said, wanted) for said, wanted, _ in row["prompt"] + row["locality"]] for row in rows]
    assert told == [[([0], [1]), ([0], [0])], [([0], [1]), ([2], [0])]]

    assert publish(public, tmp_path / "again") == 5
    for path in (public / "jobs").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(public)).read_bytes()


def test_publishing_replaces_no_job_that_a_run_made(board: Path, tmp_path: Path) -> None:
    shutil.copytree(board, tmp_path / "other")
    for target in (board, tmp_path / "other"):
        with pytest.raises(ValueError, match=r"jobs/a was made by a run, .* publish into another folder"):
            publish(board, target)
    assert all(record.prompt for job in load_jobs(board) for record in job.records)
    public = tmp_path / "public"
    publish(board, public)
    (public / "jobs/b" / DONE).unlink()  # at work
    with pytest.raises(ValueError, match=r"jobs/b was made by a run"):
        publish(board, public)


def test_the_command_publishes_and_says_what_is_wrong(board: Path, tmp_path: Path) -> None:
    def call(*arguments: Path | str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "evaluation.leaderboard", *map(str, arguments)]
        done = subprocess.run(command, cwd=METHODS.parents[2], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    public, empty = tmp_path / "public", tmp_path / "empty"
    status, said, wrong = call(board, "--publish", public, "--against", "Strong")
    assert status == 0, wrong
    assert "Strong is ahead by" in said
    assert "Strong is ahead by" in (public / "against.md").read_text()
    assert (public / "leaderboard.md").read_text() == (board / "leaderboard.md").read_text()
    for arguments, why in (
        ((empty, "--publish", public), f"{empty} holds no finished job"),
        ((board, public, "--publish", empty), "the jobs of one folder"),
        ((public, "--data", HELD_TEXT), "was made with this file"),
        ((public, "--data", empty / "none.json"), "none.json"),
        ((public, "--against", "Nobody"), "has no method 'Nobody'"),
    ):
        status, _, wrong = call(*arguments)
        assert status == 2
        assert why in wrong


def test_whoever_has_the_data_reads_the_questions_of_what_is_published(board: Path, tmp_path: Path) -> None:
    towns = tmp_path / "towns.json"
    facts = [
        {"case_id": f"r{i}", "prompt": f"Town {i} lies in", "subject": f"Town {i}", "target_new": "Rome",
         "rephrase_prompt": f"People find Town {i} in", "locality_prompt": f"Village {i} lies in",
         "locality_ground_truth": "Oslo"}
        for i in range(4)
    ]  # fmt: skip
    towns.write_text(json.dumps(facts))
    checksum = hashlib.sha256(towns.read_bytes()).hexdigest()
    for name in "abc":
        change(board / "jobs" / name, dataset={"checksum": checksum, "shape": None, "order": "first", "skip": 0})
    public = tmp_path / "public"
    publish(board, public)
    build(public)
    assert "Town 2 lies in" not in (public / "leaderboard.html").read_text()
    rows = build(public, [towns])
    assert "Town 2 lies in" in (public / "leaderboard.html").read_text()
    assert [row.to_dict() for row in rows] == [row.to_dict() for row in build(public)]
    (public / "jobs/a" / RECORDS).write_text(json.dumps([{"case_id": "r1"}, {"case_id": "r0"}]))
    with pytest.raises(ValueError, match=r"towns.json: read today, it has other records than a was made with"):
        build(public, [towns])


def test_a_batchs_time_in_the_toolkits_results_counts_once(tmp_path: Path) -> None:
    """It stands beside each of the batch's records; the last batch may be short."""
    folder = tmp_path / "board/jobs/a"
    job(folder, "Theirs", 1)
    shutil.rmtree(folder / "phases")
    post: dict[str, Any] = {"rewrite_acc": [1.0], "locality": {}, "portability": {}}
    times = (4.0, 4.0, 4.0, 5.0)
    metrics = [{"case_id": f"r{i}", "pre": {}, "post": post, "time": time} for i, time in enumerate(times)]
    (folder / TOOLKIT).write_text(json.dumps(metrics))
    (folder / DONE).write_text(json.dumps({"batch_size": 3}))
    (found,) = build(tmp_path / "board")
    assert found.metrics["seconds_per_edit"] == pytest.approx(((4 + 5) / 4, 4 / 3, 5))


def single(folder: Path, batches: int) -> None:
    """A finished job of single rounds, all of which find the same in the held text."""
    job(folder, f"Rounds of {batches}", 1, steps=())
    config = yaml.safe_load((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(yaml.safe_dump(config | {"protocol": {"name": "single"}}))
    journal = Folder(folder)
    for path in (folder / "phases").iterdir():
        path.unlink()
    held = [[100.0 + 9 * i, 50] for i in range(6)]
    header = {"edits": 0, "held": held}
    journal.keep(Phase("before", header, [row(i, False) for i in range(4)]))
    after = [[loss + 5 * i, count] for i, (loss, count) in enumerate(held)]
    for number in range(batches):
        rows = [row(i, i < 1) for i in range(number * 4 // batches, (number + 1) * 4 // batches)]
        journal.keep(Phase(f"batch-{number:06d}", {**header, "held": after}, rows))


def test_reading_a_window_again_makes_no_perplexity_surer(tmp_path: Path) -> None:
    """Single rounds read the same windows after every batch."""
    for batches in (1, 4):
        single(tmp_path / f"board/jobs/{batches}", batches)
    one, other, _ = (found.metrics["perplexity_ratio"] for found in build(tmp_path / "board"))
    assert one == pytest.approx(other)
    assert one[2] - one[1] > 0.1


def test_the_trade_offs_interval_is_that_of_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each record's rephrasings make up for its prompt, nothing about their mean is uncertain."""
    folder = tmp_path / "board/jobs/a"
    job(folder, "Even", 1, steps=())
    header = {"edits": 4, "held": [[100.0, 50], [120.0, 50]]}
    rows = [{**row(i, i % 2 == 0), "rephrases": [answer(i % 2 == 1)]} for i in range(4)]
    Folder(folder).keep(Phase("after-000004", header, rows))
    bars: dict[str, list[Any]] = {}

    def look(figure: Any, path: Path) -> None:
        bars[path.name] = [axis.containers[0] for axis in figure.axes]
        save(figure, path)

    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", look)
    build(tmp_path / "board")
    (bar,) = bars["trade-off"]
    _, up = bar.lines[2]
    assert list(bar.lines[0].get_ydata()) == [0.5]
    assert up.get_segments()[0][:, 1] == pytest.approx([0.5, 0.5])


def test_the_page_says_how_each_protocol_scores(tmp_path: Path) -> None:
    job(tmp_path / "board/jobs/a", "Theirs", 1)
    single(tmp_path / "board/jobs/b", 2)
    job(tmp_path / "board/jobs/c", "Ours", 1)
    for name, protocol in (("a", {"name": "batch_edit", "sequential": True}), ("c", {"name": "consecutive"})):
        folder = tmp_path / "board/jobs" / name
        told = yaml.safe_load((folder / CONFIG).read_text()) | {"protocol": protocol}
        (folder / CONFIG).write_text(yaml.safe_dump(told))
    build(tmp_path / "board")
    text = (tmp_path / "board/leaderboard.html").read_text()
    told = dict(re.findall(r"<li><b>(.*?)</b>: (.*?)</li>", text))
    assert set(told) == {"batch_edit, sequential", "single", "consecutive"}
    assert "right after" in told["batch_edit, sequential"]
    assert "edits stay" in told["batch_edit, sequential"]
    assert "unedited model" in told["single"]
    assert "all scores after the last" in told["consecutive"]


def test_nothing_in_the_data_can_leave_its_script_element(board: Path) -> None:
    text = (board / "leaderboard.html").read_text()
    assert text.lower().count("<script") == text.lower().count("</script") == 2
    assert json.loads(embedded({"text": NASTY})) == {"text": NASTY}
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["sets"][0][1]["portability"][0][1] == NASTY


class Links(html.parser.HTMLParser):
    """Everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_needs_no_other_file(board: Path) -> None:
    links = Links()
    links.feed((board / "leaderboard.html").read_text())
    assert links.found
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links.found)


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def browse(board: Path) -> Callable[[str], dict[str, Any]]:
    """`browse(script)`: what a script in the loaded page tells, in a real browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to look at the page with (any of {', '.join(BROWSERS)})")

    def asked(script: str) -> dict[str, Any]:
        page = board / "asked.html"
        shown = "Object.assign(document.createElement('pre'), {textContent: JSON.stringify(f())})"
        asks = f"const f = () => {{ {script} }}; document.body.replaceChildren({shown});"
        addition = f"<script>addEventListener('load', () => {{ {asks} }});</script>"
        page.write_text((board / "leaderboard.html").read_text().replace("</body>", f"{addition}</body>"))
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
        found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
        assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
        answer: dict[str, Any] = json.loads(html.unescape(found[1]))
        return answer

    return asked


def test_a_reader_can_sort_filter_and_look_at_each_edit(browse: Callable[[str], dict[str, Any]]) -> None:
    found = browse("""
        const all = (selector) => [...document.querySelectorAll(selector)];
        const methods = () => all("#board tbody th").map((cell) => cell.textContent);
        const sort = (name) => document.querySelector(`#board button[data-column="${name}"]`).click();
        const choose = (id, value) => {
          document.getElementById(id).value = value;
          document.getElementById(id).dispatchEvent(new Event("change"));
        };
        const told = { start: methods(), title: document.title };
        sort("reliability"); told.best = methods();
        sort("reliability"); told.worst = methods();
        told.sorted = all("#board th[aria-sort=ascending]").map((cell) => cell.textContent);
        sort("seconds_per_edit"); told.focus = document.activeElement.dataset.column;
        choose("job", "2");
        told.menu = all("#job option").length;
        told.edits = all("#edits li").length;
        choose("show", "reliability");
        told.failures = all("#edits li").length;
        told.count = document.getElementById("count").textContent;
        all("#edits button")[0].click();
        told.detail = document.getElementById("detail").textContent;
        choose("show", "locality");
        told.changed = all("#edits button").map((button) => button.textContent);
        document.getElementById("search").value = "no such text";
        document.getElementById("search").dispatchEvent(new Event("input"));
        told.nothing = document.getElementById("detail").textContent;
        told.images = all("img").every((image) => image.naturalWidth > 100 && image.alt);
        told.scripts = all("script").length;
        told.labels = all("select, input").every((field) => field.labels.length === 1);
        return told;
    """)
    assert found["title"] == "Leaderboard: board"
    assert found["start"] == found["best"] == ["Strong", "Strong (beta=3)", "Weak", "unedited"]
    assert found["worst"] == found["best"][::-1]
    assert found["menu"] == 3  # the unedited model has no edits to look at
    assert found["sorted"] == ["reliability"]
    assert found["focus"] == "seconds_per_edit"
    assert (found["edits"], found["failures"], found["count"]) == (4, 3, "3 of 4 edits")
    assert NASTY in found["detail"]  # shown, not run
    assert "Town 1" in found["detail"]
    assert found["changed"] == ["Town 3 lies in → Rome not learned"]
    assert found["nothing"] == "No edit fits."
    assert found["images"] is True
    assert found["labels"] is True
    assert found["scripts"] == 3  # the page's two and the one that asks


def test_a_reader_can_look_at_one_comparison_alone(board: Path, browse: Callable[[str], dict[str, Any]]) -> None:
    """Methods on other records, or after other numbers of edits, are no rivals."""
    job(board / "jobs/e", "Elsewhere", 1)
    change(board / "jobs/e", dataset={"skip": 4})
    build(board)
    found = browse("""
        const told = {};
        const group = document.getElementById("group");
        for (const { value, textContent } of [...group.options]) {
          group.value = value;
          group.dispatchEvent(new Event("change"));
          told[textContent] = [...document.querySelectorAll("#board tbody th")].map((cell) => cell.textContent);
        }
        return told;
    """)
    here = ["Strong", "Strong (beta=3)", "Weak", "unedited"]
    assert {title: sorted(methods) for title, methods in found.items()} == {
        "all": sorted([*here, "Elsewhere", "unedited"]),
        "towns, 4 edits, consecutive, tiny": here,
        "towns from record 5, 4 edits, consecutive, tiny": ["Elsewhere", "unedited"],
    }


def test_marks_are_those_of_the_scores_where_answers_only_look_alike(
    board: Path, browse: Callable[[str], dict[str, Any]]
) -> None:
    """Other tokens may spell the same text, and white space is not shown."""
    journal = Folder(board / "jobs/a")
    phase = journal.phase("after-000004")
    assert phase is not None
    rows = [{**row, "texts": {**row["texts"], "prompt": ["Rome"]}} for row in phase.rows]
    journal.keep(Phase(phase.name, phase.header, rows))
    build(board)
    found = browse("""
        const all = (selector) => [...document.querySelectorAll(selector)];
        const job = document.getElementById("job");
        job.value = [...job.options].find((option) => option.textContent.startsWith("Weak")).value;
        job.dispatchEvent(new Event("change"));
        const marks = [];
        for (let i = 0; i < all("#edits button").length; i += 1) {
          all("#edits button")[i].click();
          marks.push(all("#detail tbody tr").map((line) => line.lastChild.textContent.slice(-1)).slice(0, 4).join(""));
        }
        return { marks };
    """)
    # The first is learned, the last one's neighbour has changed.
    assert found["marks"] == ["✓✓✓✗", "✗✗✓✗", "✗✗✓✗", "✗✗✗✗"]
