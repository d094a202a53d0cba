"""Every shipped hyperparameter file loads, and names modules that its model family has."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from coachhook_plugin.hparams import CoachHooKHparams
from coachhook_plugin.shipped import shipped_hparams, shipped_names

ROOT = Path(__file__).parent.parent
HPARAMS = ROOT / "hparams"
VOCABULARY, HIDDEN, INNER = 40, 8, 24

# name of the file: (family's config class, number of blocks, tied embeddings) of the real model
FAMILIES: dict[str, tuple[type[PretrainedConfig] | None, int, bool]] = {
    "smollm2-135m": (LlamaConfig, 30, True),
    "gpt2-xl": (GPT2Config, 48, True),
    "gpt-j-6B": (GPTJConfig, 28, False),
    "llama-2-7b": (LlamaConfig, 32, False),
    "llama3-8b": (LlamaConfig, 32, False),
    "mistral-7b": (MistralConfig, 32, False),
    "qwen2.5-7b": (Qwen2Config, 28, False),
    "qwen3-8b": (getattr(transformers, "Qwen3Config", None), 36, False),  # since transformers 4.51
}


@pytest.fixture(autouse=True)
def small_model_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the files: the small model need not be converted for them."""
    monkeypatch.setattr("coachhook_plugin.smollm2.smollm2_path", lambda: "folder-of-smollm2")


def tiny(name: str) -> nn.Module:
    """The family's own class with the real number of blocks, a few entries wide."""
    kind, blocks, tied = FAMILIES[name]
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} does not have the family of {name}")
    config = kind(vocab_size=VOCABULARY, tie_word_embeddings=tied)
    for key, value in {
        "hidden_size": HIDDEN,
        "num_hidden_layers": blocks,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": HIDDEN // 2,
        "intermediate_size": INNER,
        "n_inner": INNER,
        "rotary_dim": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }.items():
        if hasattr(config, key):
            setattr(config, key, value)
    config.layer_types = ["full_attention"] * blocks
    return AutoModelForCausalLM.from_config(config)


def check_memit_modules(model: nn.Module, config: dict) -> None:
    last = max(config["layers"])
    blocks = model.get_submodule(config["layer_module_tmp"].removesuffix(".{}"))
    assert isinstance(blocks, nn.ModuleList)
    assert last < len(blocks)
    assert config["v_loss_layer"] == len(blocks) - 1
    for layer in config["layers"]:
        projection = model.get_submodule(config["rewrite_module_tmp"].format(layer))
        assert sorted(projection.weight.shape) == [HIDDEN, INNER]
        mlp = model.get_submodule(config["mlp_module_tmp"].format(layer))
        attention = model.get_submodule(config["attn_module_tmp"].format(layer))
        block = model.get_submodule(config["layer_module_tmp"].format(layer))
        assert projection in set(mlp.modules())
        assert {mlp, attention} <= set(block.children())
    assert model.get_submodule(config["ln_f_module"]).weight.shape == (HIDDEN,)
    assert model.get_submodule(config["lm_head_module"]).weight.shape == (VOCABULARY, HIDDEN)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 3, VOCABULARY)  # a working model, not only names


def test_what_is_shipped() -> None:
    assert set(shipped_names("CoachHooK")) == set(FAMILIES)
    assert shipped_names("MEMIT") == shipped_names("WISE") == ["smollm2-135m"]
    assert shipped_names("no such method") == []
    assert shipped_hparams("no-such-model") is None
    assert shipped_hparams("../MEMIT/smollm2-135m") is None


@pytest.mark.parametrize("name", FAMILIES)
def test_same_by_name_and_by_path(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = HPARAMS / "CoachHooK" / name
    by_path = CoachHooKHparams.from_hparams(path)
    assert CoachHooKHparams.from_hparams(str(path)) == by_path
    assert CoachHooKHparams.from_hparams(f"{path}.yaml") == by_path
    monkeypatch.chdir(ROOT)
    assert CoachHooKHparams.from_hparams(f"hparams/CoachHooK/{name}") == by_path
    assert CoachHooKHparams.from_hparams(f"./hparams/CoachHooK/{name}.yaml") == by_path
    monkeypatch.chdir(tmp_path)
    assert CoachHooKHparams.from_hparams(name) == by_path
    assert CoachHooKHparams.from_hparams(f"{name}.yaml") == by_path


@pytest.mark.parametrize("name", FAMILIES)
def test_settings(name: str) -> None:
    hparams = CoachHooKHparams.from_hparams(name)
    assert hparams.alpha == 2.2
    assert hparams.batch_size == 1  # what the toolkit's .edit insists on
    assert hparams.mom2_update_weight == (500 if name == "smollm2-135m" else 15000)
    assert hparams.layers == {"gpt2-xl": [13, 14, 15, 16, 17], "gpt-j-6B": [3, 4, 5, 6, 7, 8]}.get(
        name, [4, 5, 6, 7, 8]
    )
    assert (hparams.use_hooks, hparams.accumulate, hparams.dynamic_alpha) == (True, True, True)


@pytest.mark.parametrize("name", FAMILIES)
def test_coachhook_modules(name: str) -> None:
    config = yaml.safe_load((HPARAMS / "CoachHooK" / f"{name}.yaml").read_text(encoding="utf-8"))
    check_memit_modules(tiny(name), config)


def test_memit_file() -> None:
    config = yaml.safe_load((HPARAMS / "MEMIT" / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    assert config["alg_name"] == "MEMIT"
    check_memit_modules(tiny("smollm2-135m"), config)
    ours = CoachHooKHparams.from_hparams("smollm2-135m").to_dict()
    shared = config.keys() & ours.keys() - {
        "alg_name",
        "model_name",
        "lm_head_module",  # tied embeddings: MEMIT reads them from their module, we from either
        "mom2_dataset",
        "mom2_n_samples",
        "stats_dir",
        "mom2_update_weight",  # without a scope, the pre-training keys need more weight
        "v_lr",  # fewer and longer steps reach the same targets sooner
        "v_num_grad_steps",
    }
    assert {key: config[key] for key in shared} == {key: ours[key] for key in shared}


def test_memit_keys_mean_the_same() -> None:
    """A MEMIT file becomes a CoachHooK file by its name alone."""
    config = yaml.safe_load((HPARAMS / "MEMIT" / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    hparams = CoachHooKHparams.from_dict(config | {"alg_name": "CoachHooK"})
    assert hparams.lm_head_module == "model.embed_tokens"


def test_wise_file() -> None:
    config = yaml.safe_load((HPARAMS / "WISE" / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    assert config["alg_name"] == "WISE"
    assert config["merge_freq"] % config["save_freq"] == 0
    assert len(config["act_margin"]) == 3
    model = tiny("smollm2-135m")
    for name in config["inner_params"]:
        # The toolkit writes list positions in brackets.
        weight = model.get_parameter(name.replace("[", ".").replace("]", ""))
        assert weight.shape == (HIDDEN, INNER)


@pytest.mark.once
@pytest.mark.slow
def test_wheel_carries_every_file(tmp_path: Path) -> None:
    """Unpacked far from the checkout, as an installation is, the package still finds its files by name."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"coachhook_plugin"}
    script = (
        "from coachhook_plugin.shipped import shipped_hparams, shipped_names\n"
        f"for method in {sorted(path.name for path in (ROOT / 'hparams').iterdir())}:\n"
        "    for name in shipped_names(method):\n"
        "        print(shipped_hparams(name, method))\n"
    )
    # -P keeps the current folder off the path, PYTHONPATH puts the unpacked wheel before any installation.
    found = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    root = tmp_path / "site" / "coachhook_plugin" / "_hparams"
    assert {Path(path).relative_to(root) for path in found} == {
        path.relative_to(HPARAMS) for path in HPARAMS.rglob("*.yaml")
    }
