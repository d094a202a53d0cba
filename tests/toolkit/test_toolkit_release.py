"""The bridge for the registry's release, without the release."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from toolkit_bench import save_models
from transformers import AutoModelForCausalLM

from coachhook_plugin.toolkit import devices, release


@dataclasses.dataclass
class Settings:
    device: Any
    layer_module_tmp: str = "model.layers.{}"
    ln_f_module: str = "model.norm"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
@pytest.mark.parametrize("asked", [0, "0", "cuda:1", "cpu", torch.device("cpu"), None])
def test_code_written_for_cuda_runs_on_the_cpu_and_settings_come_back(asked: Any) -> None:
    settings = Settings(asked)
    with release.as_cuda(settings):
        name = f"cuda:{settings.device}"
        there = torch.zeros(2, device=name).to(torch.device(name)).cuda().to(settings.device)
        layer = torch.nn.Linear(2, 2).to(name)
        with release.as_cuda(settings):  # entry points call each other
            assert layer(there).device.type == "cpu"
        with release.as_asked(settings):
            assert str(settings.device) == "cpu"
        assert name == f"cuda:{settings.device}"
    assert str(settings.device) == "cpu"


def test_settings_come_back_after_an_exception() -> None:
    settings = Settings("cpu")
    with pytest.raises(KeyboardInterrupt), release.as_cuda(settings):
        raise KeyboardInterrupt
    assert settings.device == "cpu"


def test_a_device_is_left_as_it_is_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for given, settled in ((1, 1), ("1", 1), ("cuda:1", "cuda:1"), ("mps", "mps"), (None, "cuda"), ("cpu", "cpu")):
        settings = Settings(given)
        devices.settle_device(settings)
        assert settings.device == settled
    settings = Settings("cuda:1")
    with release.as_cuda(settings) as number:
        assert number == settings.device == 1


def test_blocks_answer_with_tuples_and_the_model_still_works(tmp_path: Any) -> None:
    for family, settings in (
        ("llama", Settings("cpu")),
        ("gpt2", Settings("cpu", "transformer.h.{}", "transformer.ln_f")),
    ):
        model = AutoModelForCausalLM.from_pretrained(save_models(tmp_path)[family])
        ids = torch.tensor([[1, 2, 3, 4]])
        block = model.get_submodule(settings.layer_module_tmp.format(1))
        with torch.no_grad():
            expected = model(ids).logits
            seen: list[Any] = []
            with release.tuple_blocks(model, settings):
                handle = block.register_forward_hook(lambda module, args, answer, seen=seen: seen.append(answer))
                assert torch.equal(model(ids).logits, expected)
                handle.remove()
            assert type(seen[0]) is tuple
            assert torch.equal(model(ids).logits, expected)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
