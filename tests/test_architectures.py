"""The table of families: every name it gives exists, and what it cannot know is asked for in plain words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from coachhook_plugin.architectures import FAMILIES, context_length, model_parts, weight_shape
from coachhook_plugin.trace import captured

OWN_NAMES = {
    "layer_module_tmp": "model.layers.{}",
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
}


@pytest.mark.parametrize("case", zoo.EVERY)
def test_every_name_of_the_table_is_a_module_of_its_family(
    case: str, tiny: Callable[..., Any], settings: Callable[..., Any]
) -> None:
    one = tiny(case)
    parts = model_parts(one, settings(layers=[0, 3]))
    row = FAMILIES[one.config.model_type]
    assert len(parts.blocks) == zoo.LAYERS
    assert parts.hidden_size == 32
    for layer, projection in parts.projections.items():
        assert projection is one.get_submodule(row.projection.format(layer))
        assert weight_shape(projection)[0] == 32
    assert parts.head is one.get_output_embeddings()


@pytest.mark.parametrize("case", zoo.EVERY)
def test_keys_go_in_and_values_come_out_of_the_named_projection(
    case: str, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one = tiny(case)
    projection = model_parts(one, settings()).projections[1]
    d, m = weight_shape(projection)
    with torch.no_grad(), captured(projection) as seen:
        one(input_ids=torch.tensor([tokenizer("The mother tongue")["input_ids"]]))
    assert (seen.output.shape[-1], seen.input.shape[-1]) == (d, m)
    weight = projection.weight if projection.weight.shape == (d, m) and d != m else projection.weight.T
    expected = seen.input @ weight.T + (0 if projection.bias is None else projection.bias)
    assert zoo.relative(seen.output, expected) < 1e-5


def test_gpt2_stores_its_weight_the_other_way_round(tiny: Callable[..., Any], settings: Callable[..., Any]) -> None:
    projection = model_parts(tiny("gpt2"), settings()).projections[1]
    assert tuple(projection.weight.shape) == (48, 32)
    assert weight_shape(projection) == (32, 48)


def test_an_unknown_family_is_edited_by_the_names_given_for_it(
    tiny: Callable[..., Any], settings: Callable[..., Any]
) -> None:
    one, known = tiny(), model_parts(tiny(), settings())
    one.config.model_type = "brand_new"
    with pytest.raises(KeyError, match=r"(?s)brand_new.*layer_module_tmp.*lm_head_module"):
        model_parts(one, settings())
    with pytest.raises(KeyError, match="brand_new"):  # one name is not enough
        model_parts(one, settings(rewrite_module_tmp=OWN_NAMES["rewrite_module_tmp"]))
    parts = model_parts(one, settings(**OWN_NAMES))
    assert list(parts.projections) == list(known.projections)
    assert parts.names.projection == known.names.projection


def test_a_given_name_goes_before_the_tables(tiny: Callable[..., Any], settings: Callable[..., Any]) -> None:
    # MEMIT's files name the embedding as head where the two are tied.
    one = tiny("llama-tied")
    parts = model_parts(one, settings(lm_head_module="model.embed_tokens"))
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert parts.head is one.model.embed_tokens
    with torch.no_grad():
        assert torch.equal(parts.logits(hidden), model_parts(one, settings()).logits(hidden))
        assert parts.logits(hidden).shape == (3, one.config.vocab_size)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layers": [1, 4, 9]}, r"layers: \[4, 9\] out of range.*0 to 3"),
        ({"layers": [1, 2], "v_loss_layer": 1}, r"v_loss_layer is 1.*\(2\) to 3"),
        ({"v_loss_layer": 4}, r"v_loss_layer is 4"),
        ({"rewrite_module_tmp": "model.layers.{}.mlp.c_proj"}, r"no module 'model.layers.0.mlp.c_proj'"),
        ({"rewrite_module_tmp": "model.layers.{}.mlp"}, r"model.layers.0.mlp is a LlamaMLP"),
        ({"layer_module_tmp": "model.layers"}, r"layer_module_tmp is 'model.layers'"),
        ({"layer_module_tmp": "model.norm.{}"}, r"layer_module_tmp is 'model.norm.\{\}'"),
        ({"ln_f_module": "model.ln_f"}, r"no module 'model.ln_f'"),
        ({"lm_head_module": "head"}, r"no module 'head'"),
    ],
)
def test_wrong_names_and_layers_are_refused_before_anything_runs(
    changed: dict[str, Any], said: str, tiny: Callable[..., Any], settings: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=said):
        model_parts(tiny(), settings(**{"layers": [0, 1], **changed}))


class Packed(nn.Module):
    weight = torch.zeros(8, dtype=torch.uint8)


class PackedLinear(nn.Linear):
    """As quantising libraries have it: a linear layer by class, whose weight is something else."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(48, 32, bias=False)
        self.weight = nn.Parameter(weight, requires_grad=False)


QUANTISED = {
    "no linear layer": Packed(),
    "two numbers in a byte": PackedLinear(torch.zeros(48 * 32 // 2, 1, dtype=torch.uint8)),
    "bytes kept as if they were numbers": PackedLinear(torch.zeros(48 * 32 // 4, 1, dtype=torch.bfloat16)),
    "whole numbers": PackedLinear(torch.zeros(32, 48, dtype=torch.int8)),
    "floats of 8 bits": PackedLinear(torch.zeros(32, 48).to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused_with_the_remedy(
    kind: str, tiny: Callable[..., Any], settings: Callable[..., Any]
) -> None:
    one = tiny()
    one.model.layers[1].mlp.down_proj = QUANTISED[kind]
    name = type(QUANTISED[kind]).__name__
    with pytest.raises(ValueError, match=rf"layers.1.mlp.down_proj is a {name}; .*quantised.*16 or 32 bits"):
        model_parts(one, settings(layers=[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_weights_of_16_bits_and_more_are_not_taken_for_quantised(
    case: str, dtype: torch.dtype, tiny: Callable[..., Any], settings: Callable[..., Any]
) -> None:
    parts = model_parts(tiny(case, dtype=dtype), settings(layers=[1]))
    assert {weight_shape(projection) for projection in parts.projections.values()} == {(32, 48)}


def test_names_that_only_the_toolkit_needs_are_taken_and_not_looked_at(
    tiny: Callable[..., Any], settings: Callable[..., Any]
) -> None:
    given = settings(layers=[1], mlp_module_tmp="nowhere.{}", attn_module_tmp="nowhere.{}.attn")
    assert model_parts(tiny(), given).names == model_parts(tiny(), settings(layers=[1])).names


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox", "opt", "phi"])
def test_the_context_length_is_the_models(case: str, tiny: Callable[..., Any]) -> None:
    assert context_length(tiny(case)) == 128


def test_a_model_that_tells_no_context_length_has_none() -> None:
    assert context_length(nn.Linear(2, 2)) is None


def test_soft_capped_and_scaled_logits_are_not_the_heads_alone(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    ids = torch.tensor([tokenizer("The mother tongue")["input_ids"]])
    for case in ("gemma2", "granite"):
        one = tiny(case)
        parts = model_parts(one, settings())
        with torch.no_grad(), captured(parts.blocks[-1]) as seen:
            logits = one(input_ids=ids).logits
            plain = parts.head(parts.final_norm(seen.output))
        assert zoo.relative(parts.logits(seen.output), logits) < 1e-6
        assert zoo.relative(plain, logits) > 0.05
