"""What a user does with `CoachHooKEditor`, one function each; run as `toolkit_scenarios` are."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import toolkit_scenarios
import torch
from toolkit_bench import FACTS, OTHER, PROMPTS, REPHRASED, SUBJECTS, TARGETS, answer, appearance, assert_same
from toolkit_scenarios import BOTH, HEAD, QUICK, RELEASE, Bench, Scenario, edits_in_force, facts, main, raises

from coachhook_plugin import EditSession, SessionState, batch_writing

SCENARIOS: dict[str, tuple[tuple[str, ...], Scenario]] = {}
Event = tuple[str, tuple[str, ...], int]  # "score" or "edit", the prompts, the edits in force at that moment


def scenario(versions: tuple[str, ...] = BOTH) -> Callable[[Scenario], Scenario]:
    return toolkit_scenarios.scenario(versions, SCENARIOS)


def new_editor(bench: Bench, model: str = "llama", **changes: Any) -> Any:
    from coachhook_plugin import CoachHooKEditor  # imports EasyEdit, so not before `main` does

    return CoachHooKEditor.from_hparams(bench.hparams(model, **changes))


def bare(n: int = len(FACTS)) -> list[dict[str, Any]]:
    """As little as a request needs."""
    return [{"prompt": p, "subject": s, "target_new": t} for p, s, t, _ in FACTS[:n]]


def full(n: int = len(FACTS)) -> list[dict[str, Any]]:
    """Everything the toolkit scores; what is "near" asks for the edited prompts, and so does not stay."""
    return [
        request
        | {
            "ground_truth": "x",
            "rephrase_prompt": REPHRASED[i],
            "locality": {
                "near": {"prompt": [PROMPTS[i], OTHER[i]], "ground_truth": ["blue and wide", "blue"]},
                "far": {"prompt": OTHER[i], "ground_truth": "blue and wide"},
            },
            "portability": {"hop": {"prompt": REPHRASED[i], "ground_truth": TARGETS[i]}},
        }
        for i, request in enumerate(bare(n))
    ]


@contextlib.contextmanager
def recorded(bench: Bench, editor: Any, before: Callable[[Event], None] = lambda event: None) -> Iterator[list[Event]]:
    """Every score and every batch, in order; `before` may raise."""
    events: list[Event] = []
    score, edit = bench.toolkit.compute_edit_quality, EditSession.edit

    def note(kind: str, prompts: tuple[str, ...]) -> None:
        events.append((kind, prompts, edits_in_force(editor)))
        before(events[-1])

    def scored(model: Any, model_name: Any, hparams: Any, tok: Any, record: Any, *args: Any, **kwargs: Any) -> Any:
        assert model is editor.model
        note("score", (record["prompt"],))
        return score(model, model_name, hparams, tok, record, *args, **kwargs)

    def edited(self: EditSession, requests: Any, **kwargs: Any) -> Any:
        note("edit", tuple(request["prompt"] for request in requests))
        return edit(self, requests, **kwargs)

    bench.toolkit.compute_edit_quality = scored
    EditSession.edit = edited  # type: ignore[method-assign]
    try:
        yield events
    finally:
        bench.toolkit.compute_edit_quality = score
        EditSession.edit = edit  # type: ignore[method-assign]


def scores(prompts: list[str], edits: int) -> list[Event]:
    return [("score", (prompt,), edits) for prompt in prompts]


def batch(prompts: list[str], edits: int) -> Event:
    return ("edit", tuple(prompts), edits)


def assert_same_state(found: SessionState, expected: SessionState) -> None:
    assert (found.edits, found.step, found.layers.keys()) == (
        expected.edits,
        expected.step,
        expected.layers.keys(),
    )
    for layer, state in expected.layers.items():
        other = found.layers[layer]
        assert torch.equal(other.delta, state.delta)
        assert torch.equal(other.memory.matrix, state.memory.matrix)
    assert type(found.scope) is type(expected.scope)
    for name, told in ({} if expected.scope is None else vars(expected.scope)).items():
        other_told = getattr(found.scope, name)
        assert torch.equal(other_told, told) if isinstance(told, torch.Tensor) else other_told == told, name


def written_json(bench: Bench, name: str, records: list[dict[str, Any]]) -> str:
    path = bench.folder / f"{name}.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


@scenario()
def all_scores_before_then_all_batches_then_all_scores_after(bench: Bench) -> None:
    editor = new_editor(bench, batch_size=3, **QUICK)
    with recorded(bench, editor) as events:
        run = editor.consecutive_edit(bare(), verbose=False)
    assert events == [
        *scores(PROMPTS, 0),
        batch(PROMPTS[:3], 0),
        batch(PROMPTS[3:], 3),
        *scores(PROMPTS, 4),
    ]
    assert [list(metric) for metric in run.metrics] == [
        ["case_id", "requested_rewrite", "pre", "time", "post"],
    ] * 4
    assert [metric["case_id"] for metric in run.metrics] == [0, 1, 2, 3]
    assert [metric["requested_rewrite"]["prompt"] for metric in run.metrics] == PROMPTS
    assert [[request.prompt for request in result.requests] for result in run.batches] == [PROMPTS[:3], PROMPTS[3:]]
    first, second = (result.seconds for result in run.batches)
    assert [metric["time"] for metric in run.metrics] == [first, first, first, second]
    assert run.retention == {}
    assert edits_in_force(editor) == 4


@scenario()
def retention_is_scored_between_the_batches_and_only_of_what_is_edited(bench: Bench) -> None:
    editor = new_editor(bench, batch_size=4, **QUICK)
    with recorded(bench, editor) as events:
        run = editor.consecutive_edit(bare(), batch_size=1, evaluate_at=(2, 4, 3), verbose=False)
    assert events == [
        *scores(PROMPTS, 0),
        *(batch([PROMPTS[i]], i) for i in range(2)),
        *scores(PROMPTS[:2], 2),
        batch(PROMPTS[2:3], 2),
        *scores(PROMPTS[:3], 3),
        batch(PROMPTS[3:], 3),
        *scores(PROMPTS, 4),
    ]
    assert {edits: len(found) for edits, found in run.retention.items()} == {2: 2, 3: 3, 4: 4}
    assert editor.hparams.batch_size == 4


@scenario()
def an_edit_that_a_later_batch_overwrites_is_scored_as_it_ended(bench: Bench) -> None:
    editor = new_editor(bench, "gpt2", batch_size=1)
    first, second = bare(1)[0], bare(1)[0] | {"target_new": "Berlin"}
    run = editor.consecutive_edit([first, second], evaluate_at=[1, 2], verbose=False)
    assert [metric["pre"]["rewrite_acc"] for metric in run.metrics] == [[0.0], [0.0]]
    assert [found["rewrite_acc"] for found in run.retention[1]] == [[1.0]]
    assert [metric["post"]["rewrite_acc"] for metric in run.metrics] == [[0.0], [1.0]]
    assert answer(editor.model, editor.tok, PROMPTS[0], 1) == " Berlin"


@scenario()
def retention_is_what_a_run_that_stops_there_finds(bench: Bench) -> None:
    editor, stopped, plain = (new_editor(bench, "gpt2", batch_size=2) for _ in range(3))
    run = editor.consecutive_edit(full(), evaluate_at=[2, 4], verbose=False)
    short = stopped.consecutive_edit(full(2), verbose=False)
    assert run.retention[2] == [metric["post"] for metric in short.metrics]
    assert run.retention[4] == [metric["post"] for metric in run.metrics]
    for metric, longer in zip(short.metrics, run.metrics, strict=False):
        assert metric["pre"] == longer["pre"] != metric["post"]
    assert_same_state(stopped.session.state, run_until(editor, run, 2))
    plain.consecutive_edit(full(), verbose=False)  # looking in between changes nothing
    assert_same_state(editor.session.state, plain.session.state)


def run_until(editor: Any, run: Any, edits: int) -> SessionState:
    """The state after so many edits of a run in batches of two, made again from its start."""
    session = editor.session
    end = session.state
    session.restore(run.start)
    for i in range(0, edits, 2):
        session.edit([metric["requested_rewrite"] for metric in run.metrics[i : i + 2]])
    state: SessionState = session.state
    session.restore(end)
    return state


@scenario()
def stops_and_sizes_that_do_not_fit_are_refused_before_anything_happens(bench: Bench) -> None:
    editor = new_editor(bench, batch_size=2, **QUICK)
    found = appearance(editor.model)
    with recorded(bench, editor) as events:
        for stops, named in (([1], "[1]"), ([4, 0], "[0]"), ([2, 6, 5], "[5, 6]"), ([-2], "[-2]")):
            with raises(ValueError, f"evaluate_at: {named} is not the end of a batch of 2"):
                editor.consecutive_edit(bare(), evaluate_at=stops, verbose=False)
        for size in (0, -1):
            with raises(ValueError, f"batch_size is {size}"):
                editor.consecutive_edit(bare(), batch_size=size, verbose=False)
        with raises(ValueError, "requests is empty"):
            editor.consecutive_edit([], verbose=False)
        editor.consecutive_edit(bare(3), evaluate_at=[3], verbose=False)  # the last batch may be short
    assert events[0] == ("score", (PROMPTS[0],), 0)
    assert len([event for event in events if event[0] == "edit"]) == 2
    editor.session.detach()
    assert_same(appearance(editor.model), found)


@scenario()
def scores_are_those_of_the_toolkits_own_function(bench: Bench) -> None:
    for model in ("llama", "gpt2"):
        editor = new_editor(bench, model, batch_size=3)
        score = bench.toolkit.compute_edit_quality
        rest = editor.model_name, editor.hparams, editor.tok
        before = [score(editor.model, *rest, request, editor.hparams.device) for request in full()]
        run = editor.consecutive_edit(full(), verbose=False)
        after = [score(editor.model, *rest, request, editor.hparams.device) for request in full()]
        assert [metric["pre"] for metric in run.metrics] == before
        for metric, pre, expected in zip(run.metrics, before, after, strict=True):
            post = copy.deepcopy(metric["post"])
            for kind in ("near", "far"):
                pairs = zip(pre["locality"][f"{kind}_output"], expected["locality"][f"{kind}_output"], strict=True)
                shares = [float(np.mean(np.equal(*pair))) for pair in pairs]
                assert post["locality"].pop(f"{kind}_acc") == shares
                post.get("metric_meta", {}).pop(f"locality.{kind}", None)
            assert post == expected
            assert {"rewrite_acc", "rephrase_acc"} <= post.keys()
            assert "hop_acc" in post["portability"]
        assert min(share for metric in run.metrics for share in metric["post"]["locality"]["near_acc"]) < 1
        json.dumps(run.metrics)


@scenario()
def scores_are_those_of_the_toolkits_editor(bench: Bench) -> None:
    locality = {
        kind: {"prompt": [full(1)[0]["locality"][kind]["prompt"]], "ground_truth": [entry["ground_truth"]]}
        for kind, entry in full(1)[0]["locality"].items()
    }
    hops = {"hop": {"prompt": [REPHRASED[0]], "ground_truth": [TARGETS[0]]}}
    given = {"rephrase_prompts": REPHRASED[:1], "locality_inputs": locality, "portability_inputs": hops} | facts(1)
    for model in ("llama", "gpt2"):
        theirs = bench.editor(model).edit(**copy.deepcopy(given))[0][0]
        ours = new_editor(bench, model).consecutive_edit(full(1), verbose=False).metrics[0]
        if "locality" not in theirs["pre"]:  # the release throws the outputs away
            del ours["pre"]["locality"]
            for kind in ("near", "far"):
                del ours["post"]["locality"][f"{kind}_output"]
        assert ours["pre"] == theirs["pre"]
        assert ours["post"] == theirs["post"]
        assert ours["post"]["locality"]["near_acc"][0] < 1


@scenario(HEAD)
def scores_of_a_batch_are_those_of_the_toolkits_editor(bench: Bench) -> None:
    own = {"prompt": PROMPTS, "ground_truth": ["blue and wide"] * 4}
    given = {"rephrase_prompts": REPHRASED, "locality_inputs": {"near": own}, "batch_size": 4} | facts()
    size = {"batch_size": given.pop("batch_size")}
    theirs = bench.editor(**size).batch_edit(**copy.deepcopy(given))[0]
    requests = [metric["requested_rewrite"] for metric in theirs]
    ours = new_editor(bench, **size).consecutive_edit(requests, verbose=False).metrics
    for mine, other in zip(ours, theirs, strict=True):
        assert {**mine, "time": 0} == {**other, "time": 0}


@scenario(HEAD)
def free_generation_is_scored_as_in_the_toolkits_editor(bench: Bench) -> None:
    def two_tokens(editor: Any) -> Any:
        generate = editor.model.generate
        editor.model.generate = lambda **kwargs: generate(**(kwargs | {"max_new_tokens": 2}))
        return editor

    for kind in ("generate-text", "LLM-judge"):
        theirs = two_tokens(bench.editor(evaluation_type=kind, **QUICK)).edit_requests(full(1))[0][0]
        ours = two_tokens(new_editor(bench, evaluation_type=kind, **QUICK))
        mine = ours.consecutive_edit(full(1), verbose=False).metrics[0]
        assert mine["pre"] == theirs["pre"]
        assert mine["post"] == theirs["post"]
        assert {"near_acc", "near_gen_content"} <= mine["post"]["locality"].keys()


ZSRE: list[dict[str, Any]] = [
    {
        "subject": subject,
        "src": prompt,
        "alt": alt,
        "pred": "x",
        "answers": ["an answer", "another"],
        "rephrase": rephrased,
        "loc": f"nq question: {other}",
        "loc_ans": "blue and wide",
    }
    for (prompt, subject, _, rephrased), alt, other in zip(FACTS, ["Rome", "", "Berlin", "Malmö"], OTHER, strict=True)
]


@scenario()
def records_of_zsre_get_their_subject_back_and_nothing_else(bench: Bench) -> None:
    dataset = bench.toolkit.ZsreDataset
    unwrapped = dataset.__init__.__wrapped__

    class AsItWas(dataset):  # type: ignore[misc, valid-type]
        __init__ = unwrapped

    path = written_json(bench, "zsre", ZSRE)
    for size in (None, 0, 2):
        found, plain = dataset(path, size=size), AsItWas(path, size=size)
        assert len(found) == len(plain) == (3 if size is None else size)
        for i in range(len(plain)):
            assert "subject" not in plain[i]
            assert list(found[i].items()) == [*plain[i].items(), ("subject", ZSRE[plain[i]["case_id"]]["subject"])]
    found = dataset(path)
    assert [item["case_id"] for item in found] == [0, 2, 3]
    assert [item["subject"] for item in found] == [SUBJECTS[0], *SUBJECTS[2:]]
    assert dataset(path, 1)[0] == dataset(data_dir=Path(path), size=1)[0] == found[0]
    assert isinstance(found, dataset)


@scenario()
def zsre_is_edited_from_the_toolkits_data_set(bench: Bench) -> None:
    dataset = bench.toolkit.ZsreDataset(written_json(bench, "zsre", ZSRE))
    given = copy.deepcopy(list(dataset))
    editor = new_editor(bench, batch_size=2, **QUICK)
    run = editor.consecutive_edit(dataset, evaluate_at=[2], verbose=False)
    assert [metric["case_id"] for metric in run.metrics] == [0, 2, 3]
    for metric, place in zip(run.metrics, (0, 2, 3), strict=True):
        request = metric["requested_rewrite"]
        assert request["ground_truth"] == "an answer"
        assert request["locality"] == {
            "neighborhood": {"prompt": ZSRE[place]["loc"], "ground_truth": ZSRE[place]["loc_ans"]}
        }
        assert "rephrase_acc" in metric["pre"]
        assert len(metric["post"]["locality"]["neighborhood_acc"]) == 1
    assert edits_in_force(editor) == 3
    assert list(dataset) == given
    without = [{key: value for key, value in record.items() if key != "subject"} for record in ZSRE]
    named = bench.toolkit.ZsreDataset(written_json(bench, "without", [ZSRE[0], *without[1:]]))
    with recorded(bench, editor) as events, raises(KeyError, "request 1: field 'subject' is missing"):
        editor.consecutive_edit(named, verbose=False)
    assert events == []


@scenario()
def counterfact_is_edited_from_the_toolkits_data_set(bench: Bench) -> None:
    records = [
        {
            "case_id": 17 - i,
            **request,
            "ground_truth": "blue",
            "rephrase_prompt": REPHRASED[i],
            "locality_prompt": OTHER[i],
            "locality_ground_truth": "blue and wide",
        }
        for i, request in enumerate(bare())
    ]
    dataset = bench.toolkit.CounterFactDataset(written_json(bench, "counterfact", records), size=3)
    editor = new_editor(bench, "gpt2", batch_size=2)
    run = editor.consecutive_edit(dataset, verbose=False)
    assert [metric["case_id"] for metric in run.metrics] == [17, 16, 15]
    assert [metric["pre"]["rewrite_acc"] for metric in run.metrics] == [[0.0]] * 3
    assert [metric["post"]["rewrite_acc"] for metric in run.metrics] == [[1.0]] * 3
    for metric, record in zip(run.metrics, records, strict=False):
        neighborhood = {"prompt": record["locality_prompt"], "ground_truth": "blue and wide"}
        assert metric["requested_rewrite"] == record | {"locality": {"neighborhood": neighborhood}, "portability": {}}
        assert len(metric["post"]["locality"]["neighborhood_acc"]) == 1
    assert list(dataset) == records[:3]


@scenario()
def any_iterable_of_mappings_will_do_and_stays_as_it_is(bench: Bench) -> None:
    editor = new_editor(bench, batch_size=2, **QUICK)
    given = full(1) + bare(3)[1:] + [bare()[3] | {"locality": None, "portability": None, "case_id": "seven"}]
    kept = copy.deepcopy(given)
    start = editor.session.state
    found = []
    for requests in (given, tuple(given), (request for request in given)):
        run = editor.consecutive_edit(requests, verbose=False)
        assert [metric["case_id"] for metric in run.metrics] == [0, 1, 2, "seven"]
        assert run.metrics[3]["post"]["locality"] == run.metrics[1]["post"]["locality"] == {}
        found.append([(metric["pre"], metric["post"]) for metric in run.metrics])
        editor.session.restore(start)
    assert found[0] == found[1] == found[2]
    assert given == kept


@scenario()
def a_bad_request_is_named_by_its_place_and_nothing_is_scored_or_written(bench: Bench) -> None:
    editor = new_editor(bench, batch_size=2, **QUICK)
    editor.consecutive_edit(bare(1), verbose=False)
    edited, state = appearance(editor.model), editor.session.state
    good = bare()[3]
    cases: list[tuple[type[Exception], Any, tuple[str, ...]]] = [
        (KeyError, {key: good[key] for key in ("prompt", "target_new")}, ("field 'subject'",)),
        (KeyError, good | {"target_new": None}, ("field 'target_new'",)),
        (KeyError, good | {"locality_prompt": "request 0"}, ("field 'locality_ground_truth'",)),
        (ValueError, good | {"subject": "request 0"}, ("subject", "'request 0' is not in the prompt")),
        (ValueError, good | {"target_new": " "}, ("target_new", "empty")),
        (ValueError, good | {"prompt": "{}"}, ("prompt", "braces")),
        (ValueError, good | {"prompt": good["prompt"] + " blue" * 300}, ("prompt", "256")),
        (ValueError, bare(3)[2] | {"target_new": "Malmö"}, ("target_new", "of request 2 for the same prompt")),
        (ValueError, "Ada Lovelace", ("str",)),
        (ValueError, None, ("NoneType",)),
    ]
    with recorded(bench, editor) as events:
        for kind, bad, said in cases:
            for words in ("request 3", *said):
                with raises(kind, words):
                    editor.consecutive_edit([*bare(3), bad], verbose=False)
        with raises(KeyError, "request 0"):
            editor.consecutive_edit([{}], verbose=False)
    assert events == []
    assert editor.session.state is state
    assert_same(appearance(editor.model), edited)


class BrokenError(Exception):
    pass


@contextlib.contextmanager
def failing(call: int, error: type[BaseException]) -> Iterator[None]:
    """The n-th batch fails in its middle."""
    optimise, calls = batch_writing.optimise_targets, 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        found = optimise(*args, **kwargs)
        if calls == call:
            raise error
        return found

    batch_writing.optimise_targets = broken
    try:
        yield
    finally:
        batch_writing.optimise_targets = optimise


@scenario()
def what_fails_in_the_second_batch_keeps_the_first_and_the_session_goes_on(bench: Bench) -> None:
    for use_hooks, error in ((True, BrokenError), (False, KeyboardInterrupt)):
        settings = {"batch_size": 2, "use_hooks": use_hooks} | QUICK
        editor, first, whole = (new_editor(bench, **settings) for _ in range(3))
        found, start = appearance(editor.model), editor.session.state
        first.consecutive_edit(bare(2), verbose=False)
        whole.consecutive_edit(bare(), verbose=False)
        with failing(2, error), raises(error):
            editor.consecutive_edit(bare(), verbose=False)
        assert edits_in_force(editor) == 2
        assert_same_state(editor.session.state, first.session.state)
        assert_same(appearance(editor.model), appearance(first.model))
        assert editor.session.progress
        run = editor.consecutive_edit(bare()[2:], verbose=False)
        assert run.start.edits == 2
        assert_same_state(editor.session.state, whole.session.state)
        assert_same(appearance(editor.model), appearance(whole.model))
        editor.session.restore(start)
        assert_same(appearance(editor.model), found)


@scenario()
def what_fails_while_scoring_keeps_the_batches_that_landed(bench: Bench) -> None:
    editor = new_editor(bench, batch_size=2, **QUICK)
    found, start = appearance(editor.model), editor.session.state

    def stop_at(edits: int) -> Callable[[Event], None]:
        def stop(event: Event) -> None:
            if event[0] == "score" and event[2] == edits:
                raise BrokenError

        return stop

    for edits in (0, 2, 4):
        with recorded(bench, editor, stop_at(edits)), raises(BrokenError):
            editor.consecutive_edit(bare(), evaluate_at=[2], verbose=False)
        assert edits_in_force(editor) == edits
        editor.session.restore(start)
        assert_same(appearance(editor.model), found)


@scenario()
def restoring_the_start_of_a_run_is_bit_exact(bench: Bench) -> None:
    for model, use_hooks in (("llama", True), ("gpt2", True), ("llama", False)):
        editor = new_editor(bench, model, batch_size=2, use_hooks=use_hooks, **QUICK)
        found = appearance(editor.model)
        one = editor.consecutive_edit(bare(2), verbose=False)
        edited, between = appearance(editor.model), editor.session.state
        two = editor.consecutive_edit(bare()[2:], verbose=False)
        assert two.start is between
        assert edits_in_force(editor) == 4
        editor.session.restore(two.start)
        assert_same(appearance(editor.model), edited)
        assert edits_in_force(editor) == 2
        editor.session.restore(one.start)
        assert_same(appearance(editor.model), found)
        again = editor.consecutive_edit(bare(2), verbose=False)
        assert [m["post"] for m in again.metrics] == [m["post"] for m in one.metrics]
        assert_same(appearance(editor.model), edited)


@scenario()
def the_session_is_the_one_that_lives_on_the_model(bench: Bench) -> None:
    editor = new_editor(bench, batch_size=2, **QUICK)
    found = appearance(editor.model)
    assert EditSession.of(editor.model) is None
    session = editor.session
    assert session is editor.session is EditSession.of(editor.model)
    assert len(session) == 0
    assert session.hparams == editor.hparams
    assert session.hparams is not editor.hparams
    assert_same(appearance(editor.model), found)
    editor.consecutive_edit(bare(2), verbose=False)
    assert editor.session is session
    assert len(session) == 2
    with session.disabled():
        assert bench.toolkit.compute_edit_quality(
            editor.model, editor.model_name, editor.hparams, editor.tok, full(1)[0], editor.hparams.device
        )
    session.detach()
    assert_same(appearance(editor.model), found)
    assert editor.session is not session


@scenario()
def changed_hyperparameters_are_used_or_refused_never_ignored(bench: Bench) -> None:
    editor = new_editor(bench, **QUICK)
    editor.edit(**facts(1))
    editor.hparams.layers = [1]  # the session of that edit has none in force
    editor.consecutive_edit(bare(2), batch_size=2, verbose=False)
    assert list(editor.session.state.layers) == [1]
    edited = appearance(editor.model)
    editor.hparams.layers = [0, 1]
    with recorded(bench, editor) as events, raises(ValueError, "layers: [1] in force, [0, 1] given"):
        editor.consecutive_edit(bare()[2:], verbose=False)
    assert events == []
    assert_same(appearance(editor.model), edited)
    assert len(editor.session) == 2  # still reachable, to take the edits off
    editor.session.detach()
    editor.consecutive_edit(bare(1), verbose=False)
    assert list(editor.session.state.layers) == [0, 1]


@scenario()
def it_is_the_toolkits_editor_otherwise(bench: Bench) -> None:
    editor = new_editor(bench, **QUICK)
    assert isinstance(editor, bench.toolkit.BaseEditor)
    found = appearance(editor.model)
    theirs, model, _ = editor.edit(**facts(2))
    assert len(theirs) == 2
    assert_same(appearance(model), found)
    editor.consecutive_edit(bare(2), verbose=False)
    edited = appearance(model)
    editor.edit(**facts(1, start=2))
    assert_same(appearance(model), edited)
    editor.edit(sequential_edit=True, **facts(1, start=2))
    run = editor.consecutive_edit(bare()[3:], verbose=False)
    assert (run.start.edits, edits_in_force(editor)) == (3, 4)
    pair = new_editor(bench, (model, editor.tok), **QUICK)  # type: ignore[arg-type]
    assert pair.session is editor.session


@scenario(HEAD)
def the_toolkits_summary_reads_the_metrics(bench: Bench) -> None:
    run = new_editor(bench, batch_size=2).consecutive_edit(full(), verbose=False)
    summarise = sys.modules["easyeditor.editors.utils"].summary_metrics  # type: ignore[attr-defined]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        summarise(run.metrics)
    text = printed.getvalue().partition("Metrics Summary: ")[2]
    summary = eval(text, {"np": np})
    for phase in ("pre", "post"):
        for key in ("rewrite_acc", "rephrase_acc"):
            assert summary[phase][key] == np.mean([metric[phase][key] for metric in run.metrics])
        shares = [np.mean(metric[phase]["portability"]["hop_acc"]) for metric in run.metrics]
        assert summary[phase]["portability"] == {"hop_acc": np.mean(shares)}
    for kind in ("near", "far"):
        shares = [np.mean(metric["post"]["locality"][f"{kind}_acc"]) for metric in run.metrics]
        assert summary["post"]["locality"][f"{kind}_acc"] == np.mean(shares)
    assert json.loads(Path("logs/results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(run.metrics))


@scenario(RELEASE)
def devices_are_redirected_for_its_scores_too(bench: Bench) -> None:
    if torch.cuda.is_available():
        return
    editor = new_editor(bench, device=0, **QUICK)
    run = editor.consecutive_edit(bare(1), verbose=False)
    assert "rewrite_acc" in run.metrics[0]["post"]
    assert str(editor.hparams.device) == "cpu"


@scenario()
def bars_are_shown_only_when_asked_for(bench: Bench) -> None:
    editor = new_editor(bench, batch_size=2, **QUICK)
    start = editor.session.state
    for verbose in (False, True):
        written = io.StringIO()
        with contextlib.redirect_stderr(written), contextlib.redirect_stdout(written):
            editor.consecutive_edit(bare(2), verbose=verbose)
        bars = [name in written.getvalue() for name in ("before", "batches", "targets", "after")]
        assert bars == [verbose] * 4, written.getvalue()
        assert editor.session.progress
        editor.session.restore(start)


if __name__ == "__main__":
    main(SCENARIOS)
