"""What a user does with CoachHooK inside EasyEdit, one function each; run in a process of its own for each version.

`python toolkit_scenarios.py RESULTS.json` imports whichever EasyEdit the environment gives, runs every scenario and
writes {name: "" or the traceback}. One process can hold only one EasyEdit, hence not in the test process itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toolkit_bench import (
    FACTS,
    OTHER,
    PROMPTS,
    REPHRASED,
    SUBJECTS,
    TARGETS,
    answer,
    appearance,
    assert_same,
    save_models,
)

from coachhook_plugin import CoachHooKHparams, EditSession
from coachhook_plugin import target as optimisation
from coachhook_plugin import toolkit as plugin
from coachhook_plugin.store import holds_edits, read

BOTH, HEAD, RELEASE = ("head", "release"), ("head",), ("release",)
Scenario = Callable[["Bench"], None]
SCENARIOS: dict[str, tuple[tuple[str, ...], Scenario]] = {}
QUICK = {"v_num_grad_steps": 2}  # where it does not matter what the edit achieves


def scenario(
    versions: tuple[str, ...] = BOTH, scenarios: dict[str, tuple[tuple[str, ...], Scenario]] = SCENARIOS
) -> Callable[[Scenario], Scenario]:
    def collect(function: Scenario) -> Scenario:
        scenarios[function.__name__] = (versions, function)
        return function

    return collect


class Bench:
    """The toolkit, and the small models."""

    def __init__(self, toolkit: Any, folder: Path):
        self.toolkit = toolkit
        self.folder = folder
        self.models = save_models(folder)
        self.editing = sys.modules["easyeditor.editors.editor"]

    def hparams(self, model: str = "llama", **changes: Any) -> CoachHooKHparams:
        settings: dict[str, Any] = {
            "model_name": self.models.get(model, model),
            "layers": [0, 1],
            "device": "cpu",
            "v_num_grad_steps": 30,
            "v_lr": 1.0,
            "clamp_norm_factor": 8.0,
            "context_prefixes": [],  # one context: a random model learns each fact well
            "mom2_key_multiple": 4.0,
            "mom2_update_weight": 0.01,
            "alpha": 0.5,
        }
        return CoachHooKHparams(**(settings | changes))

    def editor(self, model: str = "llama", **changes: Any) -> Any:
        return self.toolkit.BaseEditor.from_hparams(self.hparams(model, **changes))

    @contextlib.contextmanager
    def scoring(self, before_call: Callable[[int, Any], None]) -> Iterator[None]:
        """Call `before_call(n, model)` before the n-th score (from 1)."""
        score, calls = self.editing.compute_edit_quality, 0

        def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            before_call(calls, model)
            return score(model, *args, **kwargs)

        self.editing.compute_edit_quality = watched
        try:
            yield
        finally:
            self.editing.compute_edit_quality = score


def facts(n: int = len(FACTS), start: int = 0) -> dict[str, Any]:
    """Arguments of an editor's entry method."""
    return {"prompts": PROMPTS[start:][:n], "target_new": TARGETS[start:][:n], "subject": SUBJECTS[start:][:n]}


def other(n: int) -> dict[str, Any]:
    return {"neighborhood": {"prompt": OTHER[:n], "ground_truth": ["blue and wide"] * n}}


def requests(n: int = len(FACTS)) -> list[dict[str, Any]]:
    rest: dict[str, Any] = {"ground_truth": "x", "locality": {}, "portability": {}}
    return [
        {"prompt": prompt, "subject": subject, "target_new": target} | rest for prompt, subject, target, _ in FACTS[:n]
    ]


def interrupt_at(call: int) -> Callable[[int, Any], None]:
    def stop(n: int, model: Any) -> None:
        if n == call:
            raise KeyboardInterrupt

    return stop


@contextlib.contextmanager
def raises(kind: type[BaseException], saying: str = "") -> Iterator[None]:
    said = None
    try:
        yield
    except kind as error:
        said = str(error)
    assert said is not None, f"no {kind.__name__}"
    assert saying in said, f"{said!r} does not say {saying!r}"


def edits_in_force(editor: Any) -> int:
    session = EditSession.of(editor.model)
    return 0 if session is None else len(session)


@scenario()
def importing_the_plugin_registers_the_method_once(bench: Bench) -> None:
    registry = sys.modules["easyeditor.util.alg_dict"].ALG_DICT  # type: ignore[attr-defined]
    batch_editor = sys.modules["easyeditor.editors.batch_editor"].BatchEditor  # type: ignore[attr-defined]
    edit, batchable = bench.toolkit.BaseEditor.edit, batch_editor.is_batchable_method
    plugin.register()
    assert plugin.import_easyeditor() is bench.toolkit
    assert bench.toolkit.BaseEditor.edit is edit
    assert batch_editor.is_batchable_method is batchable
    assert bench.editing.ALG_DICT is registry
    assert {"CoachHooK", "MEMIT"} <= set(registry)
    assert [batchable(name) for name in ("CoachHooK", "MEMIT", "ROME")] == [True, True, False]


@scenario(HEAD)
def the_checkout_of_easyedit_home_is_the_one_imported(bench: Bench) -> None:
    assert Path(bench.toolkit.__file__).is_relative_to(Path(os.environ["EASYEDIT_HOME"]))
    assert "CoachHooK" in sys.modules["easyeditor.editors.utils"].CALLABLE_RESTORE_ALGS  # type: ignore[attr-defined]


@scenario()
def a_missing_package_is_named_when_it_is_used_and_nobody_else_is_fooled(bench: Bench) -> None:
    import importlib.util

    ike = sys.modules["easyeditor.models.ike.ike_main"]
    if importlib.util.find_spec("sentence_transformers") is None:
        assert "sentence_transformers" not in sys.modules
        with raises(ImportError, "sentence-transformers"):
            ike.SentenceTransformer("any")  # type: ignore[attr-defined]
    if importlib.util.find_spec("timm") is None:
        part = sys.modules["easyeditor.trainer.blip2_models.eva_vit"]
        with raises(ImportError, "timm"):
            part.create_eva_vit_g()  # type: ignore[attr-defined]


@scenario()
def editing_facts_one_by_one_gives_the_model_back_bit_for_bit(bench: Bench) -> None:
    for name in ("llama", "gpt2"):
        editor = bench.editor(name)
        assert type(editor.tok).__name__ != "LlamaTokenizer"
        assert editor.tok.decode(editor.tok("two words").input_ids) == "two words"
        found = appearance(editor.model)
        metrics, model, undo = editor.edit(rephrase_prompts=REPHRASED[:2], locality_inputs=other(2), **facts(2))
        assert model is editor.model
        assert_same(appearance(model), found)
        assert [m["post"]["rewrite_acc"] for m in metrics] == [[1.0], [1.0]]
        assert all(0 <= m["post"]["rephrase_acc"][0] <= 1 for m in metrics)
        assert all("neighborhood_acc" in m["post"]["locality"] for m in metrics)
        undo()
        assert undo.items() == []
        assert_same(appearance(model), found)


@scenario()
def edit_requests_gives_the_model_back_bit_for_bit(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    found = appearance(editor.model)
    metrics, _, _ = editor.edit_requests(requests(2))
    assert len(metrics) == 2
    assert_same(appearance(editor.model), found)


@scenario()
def each_batch_is_undone_before_the_next_and_all_of_them_are_scored(bench: Bench) -> None:
    editor = bench.editor(batch_size=3, **QUICK)
    found, seen = appearance(editor.model), set()
    with bench.scoring(lambda n, model: seen.add(edits_in_force(editor))):
        metrics, model, _ = editor.batch_edit(**facts(4))
    assert [m["requested_rewrite"]["prompt"] for m in metrics] == PROMPTS
    assert all("rewrite_acc" in m["pre"] and "rewrite_acc" in m["post"] for m in metrics)
    assert seen == {0, 3, 1}
    assert editor.hparams.batch_size == 3
    assert_same(appearance(model), found)


@scenario()
def normal_edit_writes_all_at_once_and_gives_the_model_back(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    found = appearance(editor.model)
    nothing, model, _ = editor.normal_edit(PROMPTS, TARGETS, subject=SUBJECTS)
    assert nothing is None
    assert_same(appearance(model), found)
    with raises(KeyError, "subject"):
        editor.normal_edit(PROMPTS, TARGETS)
    assert_same(appearance(model), found)
    editor.normal_edit(PROMPTS, TARGETS, subject=SUBJECTS, sequential_edit=True)
    assert edits_in_force(editor) == 4


@scenario(HEAD)
def generate_edit_gives_the_model_back_bit_for_bit(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    generate = editor.model.generate
    editor.model.generate = lambda **kwargs: generate(**(kwargs | {"max_new_tokens": 2}))
    found = appearance(editor.model)
    hops = {"por_hop": {"prompt": [["One hop"]], "ground_truth": [["x"]]}}
    results, model, _ = editor.generate_edit(rephrase_prompts=REPHRASED[:1], portability_inputs=hops, **facts(1))
    assert set(results[0]["post"]) >= {"rewrite_ans", "rephrase_ans", "portability_ans"}
    assert_same(appearance(model), found)


@scenario()
def edits_made_one_after_another_stay_and_plain_generation_answers_with_them(bench: Bench) -> None:
    for entry, batch_size in (("edit", 1), ("batch_edit", 2)):
        editor = bench.editor("gpt2", batch_size=batch_size)
        found = appearance(editor.model)
        parameters = found["parameters"]
        metrics, model, undo = getattr(editor, entry)(sequential_edit=True, **facts(4))
        assert (edits_in_force(editor), len(metrics)) == (4, 4)
        for prompt, target in zip(PROMPTS, TARGETS, strict=True):
            assert answer(model, editor.tok, prompt, 1) == f" {target}"
        for name, value in parameters.items():
            assert torch.equal(model.get_parameter(name), value), name
        undo()  # the newest batch only
        assert edits_in_force(editor) == 4 - batch_size
        EditSession.of(model).detach()  # type: ignore[union-attr]
        assert_same(appearance(model), found)


@scenario()
def the_score_before_a_batch_does_not_know_that_batch(bench: Bench) -> None:
    editor = bench.editor("gpt2", batch_size=2)
    seen: list[tuple[bool, int]] = []
    with bench.scoring(lambda n, model: seen.append((n % 4 in (1, 2), edits_in_force(editor)))):
        metrics, _, _ = editor.batch_edit(sequential_edit=True, **facts(4))
    assert sorted(count for _, count in seen) == [0, 0, 2, 2, 2, 2, 4, 4]
    assert [m["pre"]["rewrite_acc"] for m in metrics] == [[0.0]] * 4
    assert [m["post"]["rewrite_acc"] for m in metrics] == [[1.0]] * 4


@scenario(RELEASE)
def edit_dataset_gives_the_model_back_bit_for_bit(bench: Bench) -> None:
    path = bench.folder / "facts.json"
    path.write_text(json.dumps([{"case_id": i} | request for i, request in enumerate(requests())]))
    editor = bench.editor(batch_size=2, **QUICK)
    found = appearance(editor.model)
    metrics, model, _ = editor.edit_dataset(bench.toolkit.CounterFactDataset(str(path)))
    assert all("rewrite_acc" in m["pre"] for m in metrics)
    assert_same(appearance(model), found)


@scenario(RELEASE)
def keeping_original_weights_is_a_choice_as_in_the_release(bench: Bench) -> None:
    editor = bench.editor(batch_size=3, **QUICK)
    found = appearance(editor.model)
    editor.edit(keep_original_weight=True, **facts(1))
    assert_same(appearance(editor.model), found)
    editor.edit(keep_original_weight=False, **facts(1))
    assert edits_in_force(editor) == 1
    assert editor.hparams.batch_size == 3  # the release itself leaves 1


@scenario()
def earlier_edits_survive_a_call_that_undoes_its_own(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    editor.edit(sequential_edit=True, **facts(1))
    edited = appearance(editor.model)
    editor.edit(**facts(2, start=1))
    assert_same(appearance(editor.model), edited)
    with bench.scoring(interrupt_at(3)), raises(KeyboardInterrupt):
        editor.edit(**facts(2, start=1))
    assert_same(appearance(editor.model), edited)


@scenario()
def ctrl_c_while_scoring_leaves_no_trace_of_an_edit(bench: Bench) -> None:
    for use_hooks in (True, False):
        editor = bench.editor(use_hooks=use_hooks, batch_size=2, **QUICK)
        found = appearance(editor.model)
        seen: list[int] = []

        def stop(n: int, model: Any, editor: Any = editor, seen: list[int] = seen) -> None:
            seen.append(edits_in_force(editor))
            if seen[-1]:
                raise KeyboardInterrupt

        with bench.scoring(stop), raises(KeyboardInterrupt):
            editor.batch_edit(**facts(4))
        assert seen[-1] == 2
        assert_same(appearance(editor.model), found)
        editor.hparams.batch_size = 1
        with bench.scoring(stop), raises(KeyboardInterrupt):
            editor.edit(**facts(2))
        assert seen[-1] == 1
        assert_same(appearance(editor.model), found)


@scenario()
def ctrl_c_while_writing_leaves_no_trace_of_an_edit(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    found = appearance(editor.model)
    edit = EditSession.edit

    def interrupted(self: EditSession, *args: Any) -> Any:
        edit(self, *args)
        raise KeyboardInterrupt

    EditSession.edit = interrupted  # type: ignore[method-assign]
    try:
        with raises(KeyboardInterrupt):
            editor.edit(**facts(1))
    finally:
        EditSession.edit = edit  # type: ignore[method-assign]
    assert_same(appearance(editor.model), found)


@scenario()
def ctrl_c_in_a_sequence_keeps_the_batches_that_landed(bench: Bench) -> None:
    for call in range(1, 9):
        editor = bench.editor(batch_size=2, **QUICK)
        landed = [0]

        def stop(n: int, model: Any, call: int = call, editor: Any = editor, landed: list[int] = landed) -> None:
            landed[0] = max(landed[0], edits_in_force(editor))
            if n == call:
                raise KeyboardInterrupt

        with bench.scoring(stop), raises(KeyboardInterrupt):
            editor.batch_edit(sequential_edit=True, **facts(4))
        assert edits_in_force(editor) == landed[0]


@scenario()
def a_request_that_cannot_be_edited_changes_nothing(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    found = appearance(editor.model)
    with raises(ValueError, "subject"):
        editor.edit_requests([*requests(1), requests(1)[0] | {"subject": "nowhere"}])
    assert_same(appearance(editor.model), found)


@scenario()
def a_request_is_named_by_its_place_in_the_call_whatever_batch_it_is_in(bench: Bench) -> None:
    editor = bench.editor(batch_size=2, **QUICK)
    twice = facts()
    twice["prompts"][3] = "Ada Lovelace and Ada Lovelace"
    with raises(ValueError, "request 3, subject: 'Ada Lovelace' occurs 2 times"):
        editor.batch_edit(sequential_edit=True, **twice)
    assert edits_in_force(editor) == 2
    without = requests(2)
    del without[1]["subject"]
    editor.hparams.batch_size = 1
    with raises(KeyError, f"request 1: field 'subject' is missing beside the prompt '{PROMPTS[1]}'"):
        editor.edit_requests(without)
    with raises(ValueError, "subject: holds 3 for 4 prompts; give one for each"):
        editor.normal_edit(PROMPTS, TARGETS, subject=SUBJECTS[:3])
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("coachhook_plugin.probe")
    logger.addHandler(handler)
    editor = bench.editor(scope="zscore", dynamic_alpha=False, alpha=100.0, short_prompt_ratio=1.0, **QUICK)
    editor.edit(**facts(3))
    logger.removeHandler(handler)
    assert [message.partition(":")[0] for message in told] == [f"request {i}, subject" for i in range(3)]


@scenario()
def an_undo_refuses_to_drop_later_edits(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    found = appearance(editor.model)
    apply = plugin.apply_coachhook_to_model
    first, second = requests(2)
    _, undo_first = apply(editor.model, editor.tok, [first], editor.hparams)
    after_first = appearance(editor.model)
    _, undo_second = apply(editor.model, editor.tok, [second], editor.hparams)
    with raises(RuntimeError, "newest"):
        undo_first()
    undo_second()
    undo_second()
    assert_same(appearance(editor.model), after_first)
    assert undo_first.items() == []
    undo_first()
    assert_same(appearance(editor.model), found)


@scenario()
def an_edited_copy_leaves_the_original_alone(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    apply = plugin.apply_coachhook_to_model
    first, second = requests(2)
    apply(editor.model, editor.tok, [first], editor.hparams)
    found = appearance(editor.model)
    copied, undo = apply(editor.model, editor.tok, [second], editor.hparams, copy=True)
    assert copied is not editor.model
    assert len(EditSession.of(copied)) == 2  # type: ignore[arg-type]
    assert_same(appearance(editor.model), found)
    undo()
    assert_same(appearance(copied), found)
    assert_same(appearance(editor.model), found)


@scenario()
def edits_with_other_hyperparameters_are_refused_not_mixed(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    editor.edit(**facts(1))
    editor.hparams.layers = [1]  # no edit in force: fine
    editor.edit(sequential_edit=True, **facts(1))
    edited = appearance(editor.model)
    editor.hparams.layers = [0, 1]
    with raises(ValueError, "layers"):
        editor.edit(**facts(1, start=1))
    assert_same(appearance(editor.model), edited)
    editor.hparams.layers = [1]
    editor.hparams.batch_size = 4
    editor.batch_edit(**facts(3, start=1))
    assert_same(appearance(editor.model), edited)


@scenario()
def training_mode_and_frozen_parameters_stay_as_they_were(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    editor.model.train()
    next(editor.model.parameters()).requires_grad_(False)
    found = appearance(editor.model)
    editor.edit(**facts(1))
    assert_same(appearance(editor.model), found)


@scenario()
def any_way_to_name_a_device_runs_on_a_machine_without_cuda(bench: Bench) -> None:
    if torch.cuda.is_available():
        return
    for device in (0, "0", "cpu", "cuda:1", torch.device("cpu"), None):
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, messages=messages: messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("coachhook_plugin").addHandler(handler)
        editor = bench.editor(device=device, **QUICK)
        editor.edit(**facts(1))
        logging.getLogger("coachhook_plugin").removeHandler(handler)
        assert editor.model.device.type == "cpu"
        warnings = [message for message in messages if "CUDA" in message]
        assert len(warnings) == (device in (0, "0", "cuda:1")), (device, warnings)
        assert str(editor.hparams.device) == "cpu"


@scenario()
def a_model_and_tokenizer_pair_can_be_edited(bench: Bench) -> None:
    loaded = bench.editor(**QUICK)
    editor = bench.editor((loaded.model, loaded.tok), **QUICK)
    found = appearance(loaded.model)
    metrics, model, _ = editor.edit(**facts(1))
    assert model is loaded.model
    assert editor.model_name == "llama"
    assert "rewrite_acc" in metrics[0]["post"]
    assert_same(appearance(model), found)


def own_method(bench: Bench, name: str, **changes: Any) -> Any:
    """An editor with one of the toolkit's own methods."""
    cls = getattr(bench.toolkit, f"{name}HyperParams")
    model = bench.models["llama"]
    settings: dict[str, Any] = {
        "alg_name": name,
        "model_name": model,
        "device": "cpu",
        "layers": [1],
        "layer_selection": "all",
        "fact_token": "subject_last",
        "v_num_grad_steps": 8,
        "v_lr": 0.5,
        "v_loss_layer": 2,
        "v_weight_decay": 1e-3,
        "clamp_norm_factor": 4.0,
        "kl_factor": 0.06,
        "mom2_adjustment": False,
        "mom2_update_weight": 1.0,
        "context_template_length_params": [[5, 5]],
        "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
        "layer_module_tmp": "model.layers.{}",
        "mlp_module_tmp": "model.layers.{}.mlp",
        "attn_module_tmp": "model.layers.{}.self_attn",
        "ln_f_module": "model.norm",
        "lm_head_module": "lm_head",
        "mom2_dataset": "wikitext",
        "mom2_n_samples": 10,
        "mom2_dtype": "float32",
        "stats_dir": str(bench.folder / "stats"),
        "num_steps": 3,
        "lr": 1e-2,
        "weight_decay": 0.0,
        "norm_constraint": False,
        "objective_optimization": "target_new",
        "batch_size": 1,
    }
    for folder in (Path(model).name, model.replace("/", "_")):
        path = bench.folder / "stats" / folder / "wikitext_stats" / "model.layers.1.mlp.down_proj_float32_mom2_10.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        constructor = "easyeditor.util.runningstats.SecondMoment()"
        numbers = {"mom2.count": 100, "mom2.mom2": np.eye(48, dtype=np.float32) * 100, "sample_size": 10}
        np.savez(path, **{"mom2.constructor": np.array(constructor)}, **{k: np.array(v) for k, v in numbers.items()})
    known = {field.name for field in dataclasses.fields(cls)}
    return bench.toolkit.BaseEditor(cls(**{k: v for k, v in (settings | changes).items() if k in known}))


@scenario()
def the_toolkits_own_methods_run_here_beside_ours(bench: Bench) -> None:
    for name in ("MEMIT", "ROME", "FT"):
        editor = own_method(bench, name)
        found = appearance(editor.model)["parameters"]
        keep = (
            {} if "sequential_edit" in editor.edit.__wrapped__.__code__.co_varnames else {"keep_original_weight": True}
        )
        changed: list[bool] = []

        def look(n: int, model: Any, found: Any = found, changed: list[bool] = changed) -> None:
            changed.append(any(not torch.equal(model.get_parameter(key), value) for key, value in found.items()))

        with bench.scoring(look):
            metrics, model, _ = editor.edit(**facts(2), **keep)
        assert changed == [False, False, True, True], name
        assert len(metrics) == 2
        now = appearance(model)
        assert all(torch.equal(now["parameters"][key], value) for key, value in found.items()), name
        assert not any(map(any, now["hooks"].values())), name


@scenario(RELEASE)
def the_releases_scoring_runs_here_without_an_editor(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    score = bench.toolkit.compute_edit_quality
    args = editor.model, "llama", editor.hparams, editor.tok, requests(1)[0], 0
    assert "rewrite_acc" in score(*args)


@scenario()
def edits_that_stay_are_saved_and_a_later_run_begins_with_them(bench: Bench) -> None:
    folder = str(bench.folder / "kept")
    editor = bench.editor(save_path=folder, **QUICK)
    editor.edit(sequential_edit=True, **facts(3))
    expected = appearance(editor.model)
    again = bench.editor(load_path=folder, **QUICK)
    assert edits_in_force(again) == 0  # an editor alone touches no model
    again.edit(sequential_edit=True, **facts(1, start=3))
    session = EditSession.of(again.model)
    assert len(session) == 4
    session.rollback(to=3)
    assert_same(appearance(again.model), expected)
    # The folder holds the statistics: where they were found is another machine's business.
    elsewhere = bench.editor(load_path=folder, stats_dir=str(bench.folder / "nowhere"), **QUICK)
    elsewhere.edit(sequential_edit=True, **facts(1, start=3))
    EditSession.of(elsewhere.model).keep_in(bench.folder / "from-now-on")
    elsewhere.edit(sequential_edit=True, **facts(1))
    assert EditSession.of(elsewhere.model).state.step == 5
    assert len(list((bench.folder / "from-now-on" / "steps").iterdir())) == 1
    other = bench.editor(load_path=folder, v_num_grad_steps=3)
    with raises(ValueError, "made with other hyperparameters"):
        other.edit(**facts(1))
    assert edits_in_force(other) == 0


@scenario()
def scores_before_know_the_edits_of_an_earlier_run_whichever_entry_takes_them(bench: Bench) -> None:
    loaded, session = str(bench.folder / "loaded"), bench.folder / "loaded-session"
    first = bench.editor("gpt2", save_path=loaded, batch_size=2)
    first.batch_edit(sequential_edit=True, **facts(2))
    EditSession.of(first.model).keep_in(session)  # type: ignore[union-attr]
    EditSession.of(first.model).close()  # type: ignore[union-attr]
    expected = appearance(first.model)
    entries = {"edit": facts(2), "batch_edit": facts(2), "edit_requests": {"requests": requests(2)}}
    for place in ({"load_path": loaded}, {"session_dir": str(session)}):
        for name, given in entries.items():
            editor = bench.editor("gpt2", batch_size=2 if name == "batch_edit" else 1, **place)
            metrics, model, _ = getattr(editor, name)(**given)
            assert [m["pre"]["rewrite_acc"] for m in metrics] == [[1.0], [1.0]], (name, place)
            assert_same(appearance(model), expected)  # they stay, the call's own do not
            EditSession.of(model).detach()  # type: ignore[union-attr]


@scenario(HEAD)
def texts_before_are_generated_with_the_edits_of_an_earlier_run(bench: Bench) -> None:
    folder = str(bench.folder / "loaded-for-texts")
    bench.editor("gpt2", save_path=folder, **QUICK).edit(sequential_edit=True, **facts(1))
    editor = bench.editor("gpt2", load_path=folder, **QUICK)
    generate, seen = editor.model.generate, []

    def short(**given: Any) -> Any:
        seen.append(edits_in_force(editor))
        return generate(**(given | {"max_new_tokens": 2}))

    editor.model.generate = short
    hops = {"por_hop": {"prompt": [["One hop"]], "ground_truth": [["x"]]}}
    editor.generate_edit(rephrase_prompts=REPHRASED[:1], portability_inputs=hops, **facts(1, start=1))
    assert seen == [1, 1, 1, 2, 2, 2]


@scenario()
def a_run_that_fails_takes_off_what_it_had_put_on_the_model_first(bench: Bench) -> None:
    folder, session = str(bench.folder / "taken-off"), str(bench.folder / "taken-off-session")
    bench.editor(save_path=folder, **QUICK).edit(sequential_edit=True, **facts(1))
    for place in ({"load_path": folder}, {"load_path": folder, "session_dir": session}, {"session_dir": session}):
        editor = bench.editor(**place, **QUICK)
        found = appearance(editor.model)
        with raises(KeyError, "subject"):
            editor.edit(PROMPTS[0], TARGETS[0])
        with raises(KeyError, "subject"):
            editor.normal_edit(PROMPTS, TARGETS, sequential_edit=True)
        with bench.scoring(interrupt_at(2)), raises(KeyboardInterrupt):
            editor.edit(**facts(1, start=1))
        assert_same(appearance(editor.model), found)
        assert EditSession.of(editor.model) is None
        with bench.scoring(interrupt_at(4)), raises(KeyboardInterrupt):
            editor.edit(sequential_edit=True, **facts(2, start=1))
        assert edits_in_force(editor) >= 2  # what landed stays, and what it stands on
        edited = appearance(editor.model)
        with bench.scoring(interrupt_at(1)), raises(KeyboardInterrupt):
            editor.edit(**facts(1))
        assert_same(appearance(editor.model), edited)  # the edits of an earlier call are not this one's
        EditSession.of(editor.model).detach()  # type: ignore[union-attr]


@scenario()
def an_edit_that_is_undone_after_its_scores_is_saved_all_the_same(bench: Bench) -> None:
    folder = bench.folder / "undone"
    editor = bench.editor(save_path=str(folder), **QUICK)
    editor.edit(**facts(2))
    assert edits_in_force(editor) == 0
    lines = [json.loads(line) for path in folder.glob("ledger*") for line in path.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS[1:2]  # of the last batch


@scenario()
def a_run_that_was_cut_off_goes_on_in_its_session_folder(bench: Bench) -> None:
    folder = str(bench.folder / "session")
    editor = bench.editor(session_dir=folder, **QUICK)
    with bench.scoring(interrupt_at(5)), raises(KeyboardInterrupt):
        editor.edit(sequential_edit=True, **facts(4))
    done = edits_in_force(editor)
    assert 0 < done < 4
    expected = appearance(editor.model)
    EditSession.of(editor.model).close()  # as the end of a process does
    again = bench.editor(session_dir=folder, **QUICK)
    again.edit(sequential_edit=True, **facts(4 - done, start=done))
    session = EditSession.of(again.model)
    assert len(session) == 4
    session.rollback(to=done)
    assert_same(appearance(again.model), expected)


@scenario()
def a_batch_that_landed_stays_on_the_disk_while_the_model_is_scored_without_it(bench: Bench) -> None:
    folder = bench.folder / "durable"
    editor = bench.editor(session_dir=str(folder), batch_size=2, **QUICK)
    seen: list[tuple[int, int]] = []

    def look(n: int, model: Any) -> None:
        on_disk = len(read(folder).snapshot.ledger) if holds_edits(folder) else 0
        seen.append((edits_in_force(editor), on_disk))

    with bench.scoring(look):
        editor.batch_edit(sequential_edit=True, **facts(4))
    landed = 0
    for shown, on_disk in seen:  # as a process killed at this moment would leave it
        landed = max(landed, shown)
        assert on_disk >= landed, seen
    assert landed == 4
    assert edits_in_force(editor) == 4


@scenario()
def what_may_change_between_two_calls_is_used_from_the_next_one_on(bench: Bench) -> None:
    editor = bench.editor(**QUICK)
    editor.edit(sequential_edit=True, **facts(1))
    editor.hparams.target_tokens, editor.hparams.history_steps = 7, 1
    editor.edit(sequential_edit=True, **facts(3, start=1))
    session = EditSession.of(editor.model)
    assert session.hparams == editor.hparams
    assert session.hparams is not editor.hparams
    with raises(ValueError, "history_steps"):
        session.rollback(to=1)
    asked: list[int] = []
    chunks = optimisation.micro_batches
    optimisation.micro_batches = lambda rows, budget: asked.append(budget) or chunks(rows, budget)
    try:
        editor.edit(**facts(1))
    finally:
        optimisation.micro_batches = chunks
    assert asked == [7]


@scenario()
def a_load_path_that_is_named_later_is_used_or_refused_never_ignored(bench: Bench) -> None:
    folder = str(bench.folder / "named-later")
    bench.editor(save_path=folder, **QUICK).edit(sequential_edit=True, **facts(2))
    editor = bench.editor(**QUICK)
    editor.edit(**facts(1))
    editor.hparams.load_path = folder
    editor.edit(sequential_edit=True, **facts(1, start=2))
    assert edits_in_force(editor) == 3
    editor.hparams.load_path = None
    editor.edit(sequential_edit=True, **facts(1, start=3))
    assert edits_in_force(editor) == 4
    editor.hparams.load_path = str(bench.folder / "another")
    with raises(ValueError, "load_path"):
        editor.edit(**facts(1))
    assert edits_in_force(editor) == 4


@scenario()
def after_a_session_was_closed_nobody_believes_that_its_folder_is_written(bench: Bench) -> None:
    folder = bench.folder / "closed"
    editor = bench.editor(session_dir=str(folder), **QUICK)
    editor.edit(sequential_edit=True, **facts(1))
    EditSession.of(editor.model).close()
    with raises(ValueError, "session_dir: None in force"):
        editor.edit(sequential_edit=True, **facts(1, start=1))
    editor.hparams.session_dir = None
    editor.edit(sequential_edit=True, **facts(1, start=1))
    assert (edits_in_force(editor), len(read(folder).snapshot.ledger)) == (2, 1)
    EditSession.of(editor.model).detach()
    editor.hparams.session_dir = str(folder)
    editor.edit(sequential_edit=True, **facts(2, start=2))
    assert (edits_in_force(editor), len(read(folder).snapshot.ledger)) == (3, 3)


def random_numbers() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002


def main(scenarios: dict[str, tuple[tuple[str, ...], Scenario]]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COACHHOOK_CACHE"] = os.path.join(folder, "cache")
        os.chdir(folder)  # the toolkit writes ./logs
        results = {}
        given = random_numbers()
        toolkit = plugin.import_easyeditor()
        now = random_numbers()
        results["importing_the_toolkit_leaves_random_numbers_alone"] = "" if now == given else "generators moved"
        version = "head" if "easyeditor.util.device" in sys.modules else "release"
        bench = Bench(toolkit, Path(folder))
        for name, (versions, function) in scenarios.items():
            if version in versions:
                try:
                    function(bench)
                    results[name] = ""
                except BaseException:
                    results[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps({"version": version, "results": results}))


if __name__ == "__main__":
    main(SCENARIOS)
