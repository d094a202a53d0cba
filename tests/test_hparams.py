"""Hyperparameters: what is read is what was written, and what cannot be meant is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coachhook_plugin import CoachHooKHparams, CoachHooKHyperParams

pytestmark = pytest.mark.once

LEAST = {"alg_name": "CoachHooK", "model_name": "tiny", "layers": [1, 2]}


def written(folder: Path, **changed: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **changed}), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_a_file_is_found_with_and_without_its_ending(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, alpha=1.7)
    found = CoachHooKHyperParams.from_hparams(f"{path.with_suffix('')}{suffix}")
    assert (found.alpha, found.layers, found.model_name) == (1.7, [1, 2], "tiny")


def test_the_paper_s_settings_are_the_defaults() -> None:
    found = CoachHooKHparams.from_dict(LEAST)
    assert (found.alpha, found.mom2_update_weight, found.dynamic_alpha) == (2.2, 15000.0, True)
    assert (found.use_hooks, found.accumulate) == (True, True)


def test_the_causal_scope_is_the_default_and_the_papers_is_there() -> None:
    found = CoachHooKHparams.from_dict(LEAST)
    assert (found.scope, found.scope_budget, found.scope_ridge) == ("leverage", 0.002, 0.1)
    assert CoachHooKHparams.from_dict({**LEAST, "scope": "zscore"}).scope == "zscore"


def test_every_field_survives_being_written_and_read_again(tmp_path: Path) -> None:
    first = CoachHooKHparams.from_dict({**LEAST, "alpha": 1.5, "context_prefixes": ["So. "], "device": "cpu"})
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(first.to_dict()), encoding="utf-8")
    assert CoachHooKHparams.from_hparams(path) == first
    assert set(first.to_dict()) == {f.name for f in dataclasses.fields(CoachHooKHparams)}


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("v_lr: 5e-1", "v_lr", 0.5),  # YAML 1.1 reads this as a string
        ("v_weight_decay: 1E-3", "v_weight_decay", 1e-3),
        ("kl_factor: '0.1'", "kl_factor", 0.1),
        ("alpha: 2", "alpha", 2.0),
        ("scope_budget: 1e-3", "scope_budget", 0.001),
        ("scope_ridge: 1", "scope_ridge", 1.0),
        ("scope: zscore", "scope", "zscore"),
        ("mom2_update_weight: 15e3", "mom2_update_weight", 15000.0),
        ("v_num_grad_steps: '7'", "v_num_grad_steps", 7),
        ("v_num_grad_steps: 7.0", "v_num_grad_steps", 7),
        ("mom2_n_samples: 1e5", "mom2_n_samples", 100000),
        ("mom2_n_samples: null", "mom2_n_samples", None),
        ("layers: ['1', 2.0]", "layers", [1, 2]),
        ("seed: -3", "seed", -3),
    ],
)
def test_numbers_are_read_however_yaml_spells_them(tmp_path: Path, text: str, field: str, value: Any) -> None:
    path = tmp_path / "mine.yaml"
    lines = [f"{name}: {given}" for name, given in LEAST.items() if name != field]
    path.write_text("\n".join([*lines, text]), encoding="utf-8")
    found = getattr(CoachHooKHparams.from_hparams(path), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("v_num_grad_steps", 1.05),  # neither rounded nor read as 105
        ("v_num_grad_steps", "10.02"),
        ("v_num_grad_steps", "many"),
        ("v_num_grad_steps", True),
        ("batch_size", [1]),
        ("alpha", "high"),
        ("alpha", True),
        ("alpha", None),
        ("use_hooks", "no"),
        ("use_hooks", 1),
        ("layers", "1, 2"),
        ("layers", 3),
        ("layers", [1, "two"]),
        ("layers", [1, 2.5]),
        ("layers", None),
        ("mom2_dataset", 5),
        ("mom2_dtype", "int8"),
        ("context_prefixes", "The. "),
        ("stats_dir", {"a": 1}),
        ("layer_selection", "some"),
        ("fact_token", "last"),
        ("scope", "leverages"),
        ("scope", "Z-score"),
        ("scope", None),
        ("scope", True),
        ("scope_budget", "little"),
        ("scope_budget", None),
        ("scope_ridge", [0.1]),
        ("scope_ridge", False),
        ("device", "gpu please"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        CoachHooKHparams.from_hparams(written(tmp_path, **{field: value}))
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", []),
        ("layers", [2, 1]),
        ("layers", [1, 1]),
        ("layers", [-1, 2]),
        ("batch_size", 0),
        ("v_num_grad_steps", 0),
        ("target_tokens", -1),
        ("max_length", 0),
        ("v_lr", 0.0),
        ("v_lr", float("nan")),
        ("alpha", 0),
        ("alpha", -1.0),
        ("clamp_norm_factor", 0),
        ("mom2_update_weight", 0),
        ("mom2_key_multiple", -2),
        ("v_weight_decay", -0.1),
        ("kl_factor", float("nan")),
        ("v_loss_threshold", -1),
        ("scope_budget", 0),
        ("scope_budget", 1),
        ("scope_budget", -0.1),
        ("scope_budget", float("nan")),
        ("scope_ridge", 0),
        ("scope_ridge", -1.0),
        ("scope_ridge", float("nan")),
        ("short_prompt_ratio", 0),
        ("short_prompt_ratio", 1.1),
        ("mom2_adjustment", False),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        CoachHooKHparams.from_dict({**LEAST, field: value})


def test_the_users_home_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("stats_dir", "session_dir", "save_path", "load_path")
    found = CoachHooKHparams.from_dict({**LEAST, **{name: f"~/{name}" for name in names}})
    assert [getattr(found, name) for name in names] == [str(tmp_path / name) for name in names]
    found.save_path = "~/later"
    assert dataclasses.replace(found).save_path == str(tmp_path / "later")


def test_a_misspelt_key_is_not_silently_dropped(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"mine\.yaml.*'aplha'"):
        CoachHooKHparams.from_hparams(written(tmp_path, aplha=3.0))


@pytest.mark.parametrize("field", list(LEAST))
def test_a_missing_key_is_named(field: str) -> None:
    with pytest.raises(KeyError, match=field):
        CoachHooKHparams.from_dict({name: value for name, value in LEAST.items() if name != field})


@pytest.mark.parametrize("name", ["MEMIT", "ROME", None])
def test_a_file_of_another_method_is_refused(tmp_path: Path, name: str | None) -> None:
    with pytest.raises(ValueError, match="alg_name"):
        CoachHooKHparams.from_hparams(written(tmp_path, alg_name=name))


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n- 2\n", "just words", "layers: [1, 2\nalpha: }"])
def test_a_file_without_settings_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        CoachHooKHparams.from_hparams(path)


def test_a_wrong_name_lists_the_shipped_ones() -> None:
    with pytest.raises(FileNotFoundError, match="gpt2-xl"):
        CoachHooKHparams.from_hparams("gpt2-xxl")


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (0, "cuda:0"),
        (3, "cuda:3"),
        ("1", "cuda:1"),
        (" 2 ", "cuda:2"),
        ("cpu", "cpu"),
        ("cuda:1", "cuda:1"),
        ("mps", "mps"),
        (torch.device("cpu"), "cpu"),
    ],
)
def test_a_device_is_understood_as_the_toolkit_writes_it(device: Any, expected: str) -> None:
    assert CoachHooKHparams.from_dict({**LEAST, "device": device}).torch_device() == torch.device(expected)


@pytest.mark.parametrize("there", [False, True])
def test_without_a_device_the_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert CoachHooKHparams.from_dict(LEAST).torch_device().type == ("cuda" if there else "cpu")


def test_a_wrong_scope_is_told_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"scope is 'z'; expected 'leverage' or 'zscore'"):
        CoachHooKHparams.from_dict({**LEAST, "scope": "z"})
    with pytest.raises(ValueError, match=r"scope_budget is 2\.0; it must lie between 0 and 1"):
        CoachHooKHparams.from_dict({**LEAST, "scope_budget": 2})
