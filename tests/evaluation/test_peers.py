"""The toolkit's own methods as a run sees them: set-up outside the time of an edit, states to go back to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zoo
from torch import nn

from evaluation.data import Record
from evaluation.methods import Peer, settings
from evaluation.methods.peers import TEMPLATES
from evaluation.methods.peers import peer as made
from evaluation.methods.peers.base import bytes_of
from evaluation.methods.peers.registry import CACHES, place, registered, statistics_held, usual_memory
from evaluation.protocol import NoWayBack, seed_everything

Start = Callable[..., Peer]
_VALUES: dict[str, Any] = {"v_loss_layer": 3, "v_num_grad_steps": 2, "lm_head_module": "lm_head"}
_ONE_LAYER = {"layers": [1], **_VALUES}
_PLACE = "model.layers.2.mlp.down_proj"
# What the shipped files say otherwise for a model of thirty layers.
TINY: dict[str, dict[str, Any]] = {
    "memit": {"layers": [1, 2], **_VALUES},
    "alphaedit": {"layers": [1, 2], **_VALUES},
    "emmet": _ONE_LAYER,
    "rome": _ONE_LAYER,
    "r-rome": _ONE_LAYER,
    "simie": {"inside": "ROME"},
    "ft": {"layers": [2], "num_steps": 2},
    "ultraedit": {"inner_params": [_PLACE], "lr": 0.01},
    "grace": {"inner_params": [f"{_PLACE}.weight".replace(".2.", "[2].")], "n_iter": 2},
    "wise": {
        "inner_params": [f"{_PLACE}.weight".replace(".2.", "[2].")],
        "n_iter": 2,
        "act_margin": [0.1, 0.4, 0.2],
        "save_freq": 2,
    },  # the second fact fills a shard
}
needs_checkout = pytest.mark.skipif(
    not os.environ.get("EASYEDIT_HOME"), reason="set EASYEDIT_HOME to a checkout of EasyEdit"
)


@pytest.fixture
def peer(tmp_path: Path, tokenizer: Any) -> Start:
    """A method of the toolkit on a tiny model."""
    model = zoo.model("llama", len(tokenizer))
    model.save_pretrained(tmp_path / "tiny-llama")
    tokenizer.save_pretrained(tmp_path / "tiny-llama")
    (tmp_path / "text.txt").write_text(zoo.TEXT, encoding="utf-8")
    ours = zoo.hparams(tmp_path / "text.txt", layers=[1, 2], scope_budget=0.05)

    def start(name: str, path: Path | None = None, **changes: Any) -> Peer:
        where = {"model_name": str(tmp_path / "tiny-llama")}
        inner = (
            settings(inside, "smollm2-135m", TINY[inside.lower()]) if (inside := changes.pop("inside", None)) else None
        )
        config = settings(name, "smollm2-135m", {**changes, **where}, path)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "asked.yaml").write_text(yaml.safe_dump(config))
        return made(config, ours, folder, inner)

    return start


def memit(peer: Start) -> Peer:
    return peer("memit", **TINY["memit"])


def record(number: int) -> Record:
    fact = zoo.FACTS[number]
    return Record(f"r{number}", fact["prompt"], fact["subject"], fact["target_new"], "Seoul")


def answered(method: Peer) -> torch.Tensor:
    """Logits at the end of each prompt, one row at a time."""
    rows = []
    for fact in zoo.FACTS:
        ids = torch.tensor([method.tokenizer(fact["prompt"])["input_ids"]])
        if method.asking.at is not None:
            method.asking.at(ids.shape[1] - 1)
        with torch.no_grad():
            rows.append(method.model(input_ids=ids).logits[0, -1])
    return torch.stack(rows)


def test_contexts_are_sampled_before_the_first_batch_and_stay(peer: Start) -> None:
    method = memit(peer)
    (where,) = [where for where in method.memory if where.endswith(TEMPLATES)]
    module, name = place(where)
    setattr(module, name, None)  # of another test
    method.prepare()
    sampled = getattr(module, name)
    assert len(sampled[1]) == 5
    start = method.state()
    method.edit([record(0)])
    method.restore(start)
    assert getattr(module, name) == sampled
    method.prepare()
    assert getattr(module, name) == sampled


@needs_checkout
@pytest.mark.parametrize(("algorithm", "module", "names"), [
    ("SPHERE", "SPHERE.SPHERE_main", (TEMPLATES, *CACHES)),
    ("PMET", "pmet.pmet_main", (TEMPLATES,)),
    ("MEMIT", "memit.memit_main", (TEMPLATES,)),
    ("FT", "ft", ()),
])  # fmt: skip
def test_a_method_that_nobody_described_keeps_its_contexts_and_caches_over_a_kill(
    peer: Start, algorithm: str, module: str, names: tuple[str, ...]
) -> None:
    memit(peer)
    assert set(usual_memory(algorithm)) == {f"{module}:{name}" for name in names}


@needs_checkout
@pytest.mark.parametrize(("name", "file"), [("PMET", "llama-7b"), ("MEMIT-FE", "llama-7b"), ("SPHERE", "llama3-8b")])
def test_a_method_that_nobody_described_runs_from_the_toolkits_own_file(
    peer: Start, name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # as a worker's folder: the toolkit writes there
    path = Path(os.environ["EASYEDIT_HOME"]) / "hparams" / name / f"{file}.yaml"
    method = peer(name, path, device="cpu", **TINY["memit"])
    method.prepare()
    before, start = answered(method), method.state()
    method.edit([record(0), record(1)])
    written = answered(method)
    assert not torch.equal(written, before)
    method.restore(start)
    assert torch.equal(answered(method), before)


def test_going_back_is_refused_where_a_method_has_changed_the_model_itself(peer: Start) -> None:
    method = memit(peer)
    state = method.state()
    state["weights"]["somewhere.lora_A.weight"] = torch.zeros(1)
    with pytest.raises(NoWayBack, match="MEMIT puts modules of its own into the model"):
        method.restore(state)


def test_a_method_that_edits_no_model_is_refused_by_name(peer: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """IKE gives back examples to put before a prompt; scoring the model would say nothing about it."""
    method = memit(peer)
    for given in (["an example"], (["an example"], {})):
        monkeypatch.setattr(method.editor, "apply_algo", lambda *_, given=given, **__: given)
        with pytest.raises(ValueError, match="MEMIT gives back no edited model"):
            method.edit([record(0)])


def test_memory_counts_every_tensor_once_wherever_it_is_kept() -> None:
    layer = nn.Linear(3, 5, bias=False)  # 60 bytes
    keys = torch.zeros(7, 3)  # 84 bytes, no parameter
    holder = nn.Module()
    holder.layer, holder.keys, holder.view, holder.itself = layer, keys, keys[2:], [holder]
    assert bytes_of(layer) == 60
    assert bytes_of({"a": [holder, keys], "b": (layer.weight, "text", None)}) == 144


@needs_checkout
@pytest.mark.parametrize("name", TINY)
def test_a_killed_run_of_any_method_goes_on_as_if_nothing_had_happened(peer: Start, name: str, tmp_path: Path) -> None:
    """Else half of a leaderboard would depend on when a machine was switched off."""

    def started() -> Peer:
        method = peer(name, **TINY[name])
        method.loc_prompts = ["The old man went to Norway", "Books say so"]
        seed_everything(0)
        method.prepare()
        return method

    def written(method: Peer, number: int) -> None:
        seed_everything(number)
        method.edit([record(number)])

    method = started()
    start, before = method.state(), answered(method)
    written(method, 0)
    written(method, 1)
    torch.save(method.state(), tmp_path / "state.pt")
    written(method, 3)
    whole, kept = answered(method), method.kept_bytes()
    assert not torch.equal(whole, before)
    method.restore(start)
    assert torch.equal(answered(method), before)
    again = started()
    again.restore(torch.load(tmp_path / "state.pt", weights_only=False))
    written(again, 3)
    assert torch.equal(answered(again), whole)
    assert again.kept_bytes() == kept


C0 = 48 * 48 * 4  # bytes of one layer's second moments
WEIGHT = 32 * 48 * 4  # ... and of its projection


@needs_checkout
@pytest.mark.parametrize(("name", "expected"), [
    ("memit", 2 * C0),
    ("alphaedit", 2 * C0 + 2 * C0),  # the projections, and the keys edited so far
    ("emmet", C0),
    ("rome", C0),  # its inverse
    ("r-rome", C0),
    ("simie", C0 + C0 + 2 * WEIGHT),  # ROME's, and a matrix and two weights of its own
    ("ft", 0),
])  # fmt: skip
def test_whoever_compares_memory_is_told_all_that_a_method_keeps(peer: Start, name: str, expected: int) -> None:
    method = peer(name, **TINY[name])
    for part in method._settings_parts():
        for held in statistics_held(registered(part.alg_name)):
            if isinstance(held, dict):
                held.clear()  # of the models of other tests: a run has a process of its own
    method.prepare()
    method.edit([record(0)])
    assert method.kept_bytes() == expected


@needs_checkout
def test_the_keys_that_grace_keeps_are_counted(peer: Start) -> None:
    method = peer("grace", inner_params=["model.layers[2].mlp.down_proj.weight"], n_iter=2)
    method.edit([record(0)])
    adapter: Any = method._adapter()  # type: ignore[attr-defined]
    assert method.kept_bytes() >= bytes_of([adapter.keys, adapter.values]) > bytes_of(adapter.values) > 0
    assert method.kept_bytes() < bytes_of(method.model)


@needs_checkout
def test_a_projection_that_a_killed_process_left_half_written_is_made_again(peer: Start, tmp_path: Path) -> None:
    layers = TINY["alphaedit"]
    (tmp_path / "alphaedit").mkdir()
    half = tmp_path / "alphaedit" / "null_space_project.pt"
    half.write_bytes(b"PK\\x03\\x04half")
    method = peer("alphaedit", **layers)
    assert not half.exists()
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.zeros(1)}, whole)
    half.write_bytes(whole.read_bytes())
    peer("alphaedit", **layers)
    assert half.exists()
    assert method.hparams.P_loc == str(half)


@needs_checkout
def test_no_batch_of_alphaedit_is_slower_because_it_made_the_projection(peer: Start, tmp_path: Path) -> None:
    method = peer("alphaedit", **TINY["alphaedit"])
    method.prepare()
    made = torch.load(tmp_path / "alphaedit" / "null_space_project.pt")
    assert made.shape == (2, 48, 48)
    assert torch.allclose(made @ made, made, atol=1e-5)  # projections
    assert 0 < int(made[0].trace().round()) < 48
    time = (tmp_path / "alphaedit" / "null_space_project.pt").stat().st_mtime_ns
    method.edit([record(0)])
    assert (tmp_path / "alphaedit" / "null_space_project.pt").stat().st_mtime_ns == time
