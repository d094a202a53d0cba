"""Without hooks and memory, CoachHooK is MEMIT: it writes what the toolkit's own MEMIT writes into the real model.

The toolkit's side runs in a process of its own (this file as a program): one process holds one version of EasyEdit.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.once]

LAYERS = [4, 5, 6]
PREFIXES = ["The old man said nothing. ", "Because of the rain we stayed. "]
FACTS = [
    {"prompt": "The mother tongue of Danielle Darrieux is", "subject": "Danielle Darrieux", "target_new": "English"},
    {"prompt": "The Eiffel Tower stands in the city of", "subject": "Eiffel Tower", "target_new": "Santiago"},
    {"prompt": "LeBron James plays", "subject": "LeBron James", "target_new": "ice hockey"},
]
# What both sides are told; the names are MEMIT's.
SHARED: dict[str, Any] = {
    "layers": LAYERS,
    "layer_selection": "all",
    "fact_token": "subject_last",
    "v_num_grad_steps": 6,
    "v_lr": 0.5,
    "v_loss_layer": 29,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_update_weight": 2000,
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100,
    "mom2_dtype": "float32",
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "model.embed_tokens",
    "device": "cpu",
}
COUNT = 2**12  # a power of two: dividing by it rounds nothing, whatever the precision


def by_the_toolkit(folder: Path) -> None:
    """Run the toolkit's MEMIT with our target values, then once more for the first fact with its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from coachhook_plugin.smollm2 import smollm2_path
    from coachhook_plugin.toolkit import import_easyeditor

    toolkit = import_easyeditor()
    memit = importlib.import_module("easyeditor.models.memit.memit_main")
    apply = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT["MEMIT"]
    memit.CONTEXT_TEMPLATES_CACHE = [["{}"], [prefix + "{}" for prefix in PREFIXES]]
    (folder / "memit.yaml").write_text(
        yaml.safe_dump(
            {**SHARED, "alg_name": "MEMIT", "model_name": smollm2_path(), "stats_dir": str(folder / "stats")}
        )
    )
    hparams = toolkit.MEMITHyperParams.from_hparams(str(folder / "memit.yaml"))
    model = AutoModelForCausalLM.from_pretrained(smollm2_path()).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path(), padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    requests = [{**fact, "case_id": i} for i, fact in enumerate(FACTS)]
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in LAYERS]
    weights = [model.get_parameter(name) for name in names]
    before = [weight.detach().clone() for weight in weights]
    apply(model, tokenizer, requests, hparams, cache_template=str(folder / "z" / "{}_{}_{}.npz"))
    changes = [(weight.detach() - old).clone() for weight, old in zip(weights, before, strict=True)]
    with torch.no_grad():
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
    apply(model, tokenizer, requests[:1], hparams, cache_template=str(folder / "own" / "{}_{}_{}.npz"))
    own = torch.from_numpy(np.load(folder / "own" / f"{LAYERS[-1]}_{hparams.clamp_norm_factor}_0.npz")["v_star"])
    torch.save({"changes": changes, "own": own, "file": toolkit.__file__}, folder / "memit.pt")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor], torch.Tensor]:
    """CoachHooK's side: a folder with what the toolkit shall share, the changes of the weights, the target values."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import coachhook_plugin.batch_writing as writing
    from coachhook_plugin import CoachHooKHparams, EditSession
    from coachhook_plugin.architectures import model_parts
    from coachhook_plugin.smollm2 import smollm2_path
    from coachhook_plugin.statistics import KeyStatistics, save_statistics, toolkit_paths
    from coachhook_plugin.trace import captured

    folder = tmp_path_factory.mktemp("memit")
    model = AutoModelForCausalLM.from_pretrained(smollm2_path()).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    hparams = CoachHooKHparams(
        **SHARED,
        model_name=smollm2_path(),
        stats_dir=str(folder / "stats"),
        context_prefixes=PREFIXES,
        use_hooks=False,
        accumulate=False,
    )
    parts = model_parts(model, hparams)
    text = " ".join(f"{fact['prompt']} nothing like {fact['target_new']}, they say." for fact in FACTS) * 6
    for layer, projection in parts.projections.items():
        with torch.no_grad(), captured(projection, stop=True) as seen:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
        keys = seen.input[0].double()  # (T, m)
        covariance = keys.T @ keys / len(keys)
        covariance += covariance.diagonal().mean() * torch.eye(len(covariance))  # a text this short leaves it singular
        for path in toolkit_paths(model, parts, layer, hparams):
            save_statistics(path, KeyStatistics(covariance * COUNT, COUNT), SHARED["mom2_n_samples"])

    found = []
    original = writing.optimise_targets

    def keeping(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        return found[-1]

    writing.optimise_targets = keeping
    try:
        session = EditSession(model, tokenizer, hparams, progress=False)
        before = [parts.projections[layer].weight.detach().clone() for layer in LAYERS]
        session.edit(FACTS)
    finally:
        writing.optimise_targets = original
    changes = [parts.projections[i].weight.detach() - old for i, old in zip(LAYERS, before, strict=True)]
    (folder / "z").mkdir()
    for i, value in enumerate(found[0].values.T):
        np.savez(folder / "z" / f"{LAYERS[-1]}_{SHARED['clamp_norm_factor']}_{i}.npz", v_star=value.numpy())
    return folder, changes, found[0].values


@pytest.fixture(scope="module", params=["release", "checkout"])
def theirs(request: pytest.FixtureRequest, ours: tuple[Path, Any, Any]) -> dict[str, Any]:
    environment, home = dict(os.environ), os.environ.get("EASYEDIT_HOME")
    if request.param == "release":
        environment.pop("EASYEDIT_HOME", None)
        if importlib.util.find_spec("easyeditor") is None:
            pytest.skip("the package easyeditor is not installed")
    elif not home:
        pytest.skip("EASYEDIT_HOME is not set: no checkout of EasyEdit to compare with")
    folder = ours[0]
    for file in (folder / "own").glob("*"):
        file.unlink()
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = torch.load(folder / "memit.pt")
    if request.param == "checkout":
        assert home
        assert Path(found["file"]).is_relative_to(Path(home).resolve())
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_without_hooks_and_memory_the_weights_written_are_memits(
    ours: tuple[Path, list[torch.Tensor], torch.Tensor], theirs: dict[str, Any]
) -> None:
    differences = [relative(our, their) for our, their in zip(ours[1], theirs["changes"], strict=True)]
    assert all(change.norm() > 0.01 for change in theirs["changes"])
    assert max(differences) < 1e-4, differences


def test_the_target_value_of_a_fact_is_memits(
    ours: tuple[Path, list[torch.Tensor], torch.Tensor], theirs: dict[str, Any]
) -> None:
    difference = relative(ours[2][:, 0], theirs["own"])
    assert difference < 1e-3


if __name__ == "__main__":
    by_the_toolkit(Path(sys.argv[1]))
