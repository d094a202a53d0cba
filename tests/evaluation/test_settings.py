"""Hyperparameters of a run come from the file that is meant, and a change of something unknown is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from coachhook_plugin import CoachHooKHparams
from coachhook_plugin.shipped import shipped_hparams
from evaluation.methods import settings
from evaluation.methods.settings import ALGORITHMS

CONF = Path(__file__).parents[2] / "evaluation" / "conf"
METHODS = {
    path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "method").glob("*.yaml") if path.stem != "other"
}


# Names, places, and where the text of the key statistics comes from.
NOT_OF_THE_RULE = (
    "alg_name",
    "model_name",
    "mom2_dataset",
    "mom2_n_samples",
    "stats_dir",
    "lm_head_module",
    "batch_size",
)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings_for_the_small_model_and_its_changes_fit(name: str) -> None:
    method = METHODS[name]
    found = settings(method["name"], "smollm2-135m", method["settings"])
    assert found["model_name"] == "smollm2-135m"
    assert method["label"]
    assert found | (method["settings"] or {}) == found
    assert found["alg_name"].lower() in ALGORITHMS


def test_memit_through_our_engine_has_the_settings_of_the_toolkits() -> None:
    method = METHODS["memit-engine"]
    ours = CoachHooKHparams.from_dict(settings(method["name"], "smollm2-135m", method["settings"])).to_dict()
    theirs = settings("memit", "smollm2-135m")
    shared = {name for name in theirs if name in ours and name not in NOT_OF_THE_RULE}
    assert len(shared) > 12
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert (ours["use_hooks"], ours["accumulate"], ours["v_nll_threshold"]) == (False, False, 0)


def test_the_papers_variants_take_the_steps_of_plain_adam() -> None:
    plain = torch.optim.Adam([torch.zeros(1)]).defaults["betas"]
    for name in ("coachhook-paper", "memit-engine"):
        assert METHODS[name]["settings"]["v_betas"] == list(plain)


def test_a_change_that_the_file_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no v_steps to change; it has alg_name"):
        settings("memit", "smollm2-135m", {"v_steps": 3})


def test_a_file_of_another_method_is_refused_so_that_no_row_has_a_wrong_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(settings("memit", "smollm2-135m")))
    assert settings("MEMIT", "gpt5", path=mine)["alg_name"] == "MEMIT"
    for name in ("rome", "coachhook", "PMET"):
        with pytest.raises(
            ValueError, match=r"mine.yaml: hyperparameters of MEMIT, and \w+ was asked for; give method=memit"
        ):
            settings(name, "smollm2-135m", path=mine)


def test_a_model_without_a_file_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no hyperparameters of MEMIT for 'gpt5' are shipped .*smollm2-135m.*method.hp"
    ):
        settings("memit", "gpt5")
    with pytest.raises(ValueError, match="is no file"):
        settings("memit", "gpt5", path=tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="alg_name"):
        settings("memit", "gpt5", path=tmp_path / "list.yaml")


def test_the_peers_edit_with_one_set_of_target_settings() -> None:
    """The toolkit's steps for all of them: none is ahead of another by more or larger ones."""
    names = ("MEMIT", "ROME", "R-ROME", "EMMET", "AlphaEdit")
    kept = ("v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor", "v_loss_layer")
    found = set()
    for name in names:
        path = shipped_hparams("smollm2-135m", name)
        assert path is not None
        config = yaml.safe_load(path.read_text())
        found.add(tuple(config[key] for key in kept))
    assert len(found) == 1
