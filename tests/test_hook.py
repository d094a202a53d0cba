"""Hook layers: what they answer, what they leave alone, and how they travel with the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import bits, ceiling_of, photograph, z_of
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from coachhook_plugin.hook import CHILD, HookLayer, Mode
from coachhook_plugin.scope import Gate, Thresholds, ZScoreGate
from coachhook_plugin.scope.token_mask import TokenMask

pytestmark = pytest.mark.once

D, M = 5, 7


class Toy(nn.Module):
    """A "language model" that is a projection: token ids choose keys."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.keys = nn.Embedding(30, M)
        self.projection = projection

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        flatten: bool = False,
    ) -> torch.Tensor:
        keys = self.keys(input_ids) if inputs_embeds is None else inputs_embeds  # (b, T, m)
        if flatten:  # as OPT does
            return self.projection(keys.reshape(-1, M)).view(*keys.shape[:2], D)
        return self.projection(keys)


def gate(model: Toy) -> ZScoreGate:
    return ZScoreGate(TokenMask(model), Thresholds(1.2, 0.9), torch.device("cpu"))


def toy(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Toy, HookLayer, torch.Tensor]:
    """The model, its hook layer, and Wh (d, m)."""
    torch.manual_seed(0)
    projection = Conv1D(D, M) if kind == "Conv1D" else nn.Linear(M, D, bias=kind == "biased")
    model = Toy(projection).eval().to(dtype)
    if getattr(projection, "bias", None) is not None:
        nn.init.normal_(projection.bias)
    hook = HookLayer(projection, gate(model))
    delta = torch.randn(D, M)
    hook.write(delta)
    weight = projection.weight.detach()
    return model, hook, (weight.T if kind == "Conv1D" else weight) + delta.to(dtype)


KINDS = pytest.mark.parametrize("kind", ["plain", "biased", "Conv1D"])
IDS = torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(1))


def by_hand(model: Toy, hook: HookLayer, wh: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Validated answers (T, d) of one unpadded sequence."""
    hook_mode, hook.mode = hook.mode, Mode.OFF
    base = model(torch.tensor([ids]))[0]
    hook.mode = hook_mode
    bias = getattr(model.projection, "bias", None)
    edited = [wh @ model.keys.weight[i] + (0 if bias is None else bias) for i in ids]
    norms = [float((o - p).detach().norm()) for o, p in zip(edited, base, strict=True)]
    asked = min(float(hook.gate.alpha), float(hook.gate.ratio) * ceiling_of(len(ids)))
    return torch.stack([o if z >= asked else p for o, p, z in zip(edited, base, z_of(norms), strict=True)])


@KINDS
def test_a_temporary_hook_answers_as_if_the_weight_were_replaced(kind: str) -> None:
    model, hook, wh = toy(kind)
    replaced = copy.deepcopy(model)
    hook.mode = Mode.TEMPORARY
    found = model(IDS)
    with torch.no_grad():
        replaced.projection.weight.copy_(wh.T if kind == "Conv1D" else wh)
    torch.testing.assert_close(found, replaced(IDS), rtol=1e-12, atol=1e-12)


@KINDS
def test_a_validated_hook_answers_the_tokens_in_scope_and_no_others(kind: str) -> None:
    model, hook, wh = toy(kind)
    base = model(IDS)
    hook.mode = Mode.VALIDATED
    found = model(IDS)
    expected = torch.stack([by_hand(model, hook, wh, row) for row in IDS.tolist()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    changed = (found != base).any(-1)
    assert changed.any()
    assert not changed.all()
    assert torch.equal(found[~changed], base[~changed])


class Chosen(Gate):
    """Opens the tokens it is told to, before or after a look at Delta k."""

    def __init__(self, open_: torch.Tensor | None, looks: bool) -> None:
        super().__init__()
        self.open_, self.looks, self.calls = open_, looks, 0
        self.change: torch.Tensor | None = None

    def forward(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        self.calls += 1
        if self.looks:
            self.change = change()
        return None if self.open_ is None else self.open_.view(*key.shape[:-1], 1)


@KINDS
@pytest.mark.parametrize("way", ["gate looks at the change", "gate looks at the key", "compiled"])
@pytest.mark.parametrize("chosen", ["some", "all", "none", "one", "nobody decided"])
@pytest.mark.parametrize("flatten", [False, True])
def test_exactly_the_tokens_the_gate_opens_are_answered(
    kind: str, way: str, chosen: str, flatten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hook, _ = toy(kind)
    looks = way == "gate looks at the change"
    if way == "compiled":  # or not on the CPU
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    open_ = {
        "some": torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3)) < 0.4,
        "all": torch.ones_like(IDS).bool(),
        "none": torch.zeros_like(IDS).bool(),
        "one": torch.arange(IDS.numel()).view(IDS.shape) == 13,
        "nobody decided": None,
    }[chosen]
    base = model(IDS)
    hook.mode = Mode.TEMPORARY
    edited = model(IDS)
    hook.gate, hook.mode = Chosen(open_, looks), Mode.VALIDATED
    found = model(IDS, flatten=flatten)
    expected = base if open_ is None else torch.where(open_[..., None], edited, base)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if open_ is not None:
        assert torch.equal(found[~open_], base[~open_])
    if looks:
        torch.testing.assert_close(hook.gate.change.view_as(base), edited - base, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("looks", [True, False], ids=["gate saw the change", "gate saw the key"])
def test_what_is_not_answered_gets_no_gradient_of_the_change(looks: bool) -> None:
    """Both ways of adding the change can be trained through, and say the same."""
    model, hook, wh = toy("biased")
    open_ = torch.zeros_like(IDS).bool()
    open_[0, 2] = open_[2, 5] = True
    hook.gate, hook.mode = Chosen(open_, looks), Mode.VALIDATED
    keys = model.keys(IDS).detach().requires_grad_()
    model.projection(keys).sum().backward()
    weight = model.projection.weight.detach()
    expected = torch.where(open_[..., None], wh.sum(0), weight.sum(0))
    torch.testing.assert_close(keys.grad, expected, rtol=1e-9, atol=1e-9)


def test_only_a_validated_hook_asks_its_gate() -> None:
    model, hook, _ = toy("plain")
    hook.gate = Chosen(torch.ones_like(IDS).bool(), looks=True)
    for mode, calls in ((Mode.OFF, 0), (Mode.TEMPORARY, 0), (Mode.VALIDATED, 1)):
        hook.mode = mode
        model(IDS)
        assert hook.gate.calls == calls


@KINDS
def test_a_hook_that_is_off_leaves_every_bit(kind: str) -> None:
    model, hook, _ = toy(kind)
    found = model(IDS)
    hook.remove_from(model.projection)
    assert torch.equal(found, model(IDS))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("call", ["names", "positions", "embeddings", "flattened"])
def test_a_prompt_gets_the_same_answer_whatever_it_is_padded_and_batched_with(side: str, call: str) -> None:
    model, hook, wh = toy("biased")
    hook.mode = Mode.VALIDATED
    rows = [[3, 4, 5, 6, 7], [1, 1, 2, 8, 9, 10, 11, 12], [5], [29, 0, 28, 3]]
    ids, mask = torch.full((4, 10), 17), torch.zeros(4, 10, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(10 - len(row), 10) if side == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = torch.tensor(row), 1
    if call == "positions":
        found = model(ids, mask)
    elif call == "embeddings":
        found = model(inputs_embeds=model.keys(ids), attention_mask=mask)
    else:
        found = model(input_ids=ids, attention_mask=mask, flatten=call == "flattened")
    for b, row in enumerate(rows):
        if len(row) > 1:
            alone = by_hand(model, hook, wh, row)
            torch.testing.assert_close(found[b][mask[b].bool()], alone, rtol=1e-12, atol=1e-12)
    hook.mode = Mode.OFF
    assert torch.equal(found[mask == 0], model(ids)[mask == 0])
    assert torch.equal(found[2], model(ids)[2])  # one token: the base model


def test_a_mask_that_covers_the_cached_past_is_read_at_its_end() -> None:
    model, hook, wh = toy("plain")
    hook.mode = Mode.VALIDATED
    ids = [3, 4, 5, 6, 7]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])  # two tokens of padding, one of the past, five of now
    torch.testing.assert_close(model(torch.tensor([ids]), mask)[0], by_hand(model, hook, wh, ids))
    assert torch.equal(model(torch.tensor([[4]]), mask)[0], (model.keys.weight[4] @ model.projection.weight.T)[None])


def test_a_failed_forward_pass_does_not_lend_its_mask_to_the_next() -> None:
    model, hook, wh = toy("plain")
    hook.mode = Mode.VALIDATED
    with pytest.raises(IndexError):
        model(torch.tensor([[3, 4, 99, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]]))
    keys = model.keys.weight[[3, 4, 5, 6, 7]][None]
    torch.testing.assert_close(model.projection(keys)[0], by_hand(model, hook, wh, [3, 4, 5, 6, 7]))


def test_the_base_parameters_keep_their_names_and_bits_and_the_edits_are_saved_beside_them() -> None:
    model, hook, _ = toy("biased")
    hook.remove_from(model.projection)
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    HookLayer(model.projection, gate(model)).write(torch.ones(D, M))
    after = model.state_dict()
    assert {name: bits(after[name]) for name in before} == before
    assert set(after) - set(before) == {f"projection.{CHILD}.{name}" for name in ("delta", "gate.alpha", "gate.ratio")}
    assert torch.equal(after[f"projection.{CHILD}.delta"], torch.ones(D, M))
    assert [name for name, _ in model.named_parameters()] == ["keys.weight", "projection.weight", "projection.bias"]


def test_removing_a_hook_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    model = Toy(nn.Linear(M, D))
    before = photograph(model)
    tokens = TokenMask(model)
    hook = HookLayer(model.projection, ZScoreGate(tokens, Thresholds(1.2, 0.9), torch.device("cpu")))
    assert photograph(model) != before
    hook.remove_from(model.projection)
    tokens.remove()
    assert photograph(model) == before
    assert not hasattr(model.projection, CHILD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["to", "method"])
def test_changing_the_models_dtype_rounds_the_answers_not_the_edits(dtype: torch.dtype, how: str) -> None:
    model, hook, _ = toy("biased", torch.float32)
    delta = hook.delta.clone()
    method = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    hook.mode = Mode.TEMPORARY
    in_float32 = model(IDS)
    model = model.to(dtype) if how == "to" else getattr(model, method)()
    assert model.projection.weight.dtype == dtype
    assert hook.delta.dtype == torch.float32
    assert hook.gate.alpha.dtype == torch.float64
    assert torch.equal(hook.delta, delta)
    answer = model(IDS)
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.float(), in_float32, rtol=3e-2, atol=5e-2)
    hook.mode = Mode.OFF
    assert not torch.equal(model(IDS), answer)


def test_new_edits_answer_at_once_in_half_precision() -> None:
    """The cast of Delta is kept between passes; it must not outlive the Delta it was made from."""
    model, hook, _ = toy("plain", torch.bfloat16)
    hook.mode = Mode.TEMPORARY
    model(IDS)
    hook.write(torch.zeros(D, M))
    off = F.linear(model.keys(IDS), model.projection.weight)
    assert torch.equal(model(IDS), off)


def test_loading_a_state_dict_answers_with_the_loaded_edits_and_spares_earlier_snapshots() -> None:
    model, hook, _ = toy("plain", torch.bfloat16)
    hook.mode = Mode.TEMPORARY
    snapshot = hook.delta
    kept, answer = bits(snapshot), model(IDS)
    model.load_state_dict({**model.state_dict(), f"projection.{CHILD}.delta": torch.zeros(D, M)})
    assert torch.equal(model(IDS), F.linear(model.keys(IDS), model.projection.weight))
    assert not torch.equal(model(IDS), answer)
    assert bits(snapshot) == kept


def test_edits_of_another_shape_are_refused_and_not_loaded() -> None:
    model, hook, _ = toy("plain")
    before = bits(hook.delta)
    with pytest.raises(RuntimeError, match=r"size mismatch.*delta"):
        model.load_state_dict({**model.state_dict(), f"projection.{CHILD}.delta": torch.zeros(D, M + 1)})
    assert bits(hook.delta) == before


def test_a_deep_copy_answers_by_itself() -> None:
    model, hook, _ = toy("biased")
    hook.mode = Mode.VALIDATED
    twin = copy.deepcopy(model)
    answer = model(IDS)
    assert torch.equal(twin(IDS), answer)
    hook.write(torch.zeros(D, M))
    hook.mode = Mode.OFF
    assert torch.equal(twin(IDS), answer)
    assert not torch.equal(model(IDS), answer)
    twin_hook: Any = twin.projection.get_submodule(CHILD)
    assert twin_hook.gate._tokens is not hook.gate._tokens


def test_copies_read_their_own_attention_mask() -> None:
    model, hook, wh = toy("biased")
    hook.mode = Mode.VALIDATED
    twin = copy.deepcopy(model)
    ids, mask = torch.tensor([[17, 17, 3, 4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    for one in (twin, model):
        torch.testing.assert_close(one(ids, mask)[0, 2:], by_hand(model, hook, wh, [3, 4, 5, 6, 7]))


def test_what_is_measured_is_the_change_and_the_mask() -> None:
    model, hook, _ = toy("biased")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook.mode, hook.gate.observer = Mode.VALIDATED, lambda norms, mask: seen.append((norms, mask))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    model(IDS, mask)
    ((norms, real),) = seen
    torch.testing.assert_close(norms.double(), (model.keys(IDS) @ hook.delta.double().T).norm(dim=-1))
    assert torch.equal(real, mask.bool())
