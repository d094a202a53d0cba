"""Plain accounts that the tests compare with: what a model is, bit by bit, and what one batch of edits does to it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from coachhook_plugin import EditSession
from coachhook_plugin.scope import LeverageState

# GPT-2 of transformers 4.50 cannot be run in float64. Family: dtype, and how far from the plain account it may be.
PRECISION = {"llama": (torch.float64, 1e-5), "gpt2": (torch.float32, 1e-4)}


def bits(tensor: torch.Tensor) -> bytes:
    """Not `==`: that tells neither -0 from 0 nor one NaN from another."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def photograph(model: nn.Module) -> dict[str, Any]:
    """Everything a failed edit must leave alone: tensors, modules, hooks, flags, attributes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    hooks += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return {
        "parameters": {
            name: (id(p), bits(p), p.requires_grad, None if p.grad is None else bits(p.grad))
            for name, p in model.named_parameters()
        },
        "buffers": {name: bits(b) for name, b in model.named_buffers()},
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "hooks": {
            (name, kind): [str(hook) for hook in getattr(module, kind).items()]
            for name, module in model.named_modules()
            for kind in hooks
        },
        "attributes": sorted(vars(model)),
        "session": id(EditSession.of(model)),
        "modes": [(hook.mode, hook.silent, getattr(hook.gate, "observer", None)) for hook in hook_layers(model)],
    }


def photograph_session(session: EditSession) -> dict[str, Any]:
    """What a failed edit must leave alone in the session."""
    return {
        "state": id(session.state),
        "edits": len(session),
        "layers": {
            layer: (bits(state.delta), bits(state.memory.matrix)) for layer, state in session.state.layers.items()
        },
        "scope": told(session.state.scope),
        "prefixes": list(session.prefixes),
    }


def told(scope: Any) -> Any:
    """A scope's state, bit by bit."""
    if isinstance(scope, LeverageState):
        tensors = (scope.edited, scope.witnesses, scope.lots)
        return [(bits(t), t.shape, t.dtype) for t in tensors], scope.seen, scope.threshold
    return None if scope is None else dict(scope.thresholds)


def hook_layers(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(".coachhook")]


@contextmanager
def answered(projection: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Which tokens (b, T) an edited projection answers in each forward pass of the `with` body."""
    found: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.append((output != type(module).forward(module, *inputs)).any(-1))  # without any hook

    handle = projection.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[torch.Tensor]:
    """One text at a time, without padding."""
    return [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]


@torch.no_grad()
def padded_logits(model: Any, tokenizer: Any, texts: Sequence[str], side: str, extra: int = 0) -> list[torch.Tensor]:
    """All texts in one batch; the logits at the real tokens. `extra` more columns are padding throughout."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, ids)) + extra
    rows, mask = torch.full((len(ids), width), tokenizer.pad_token_id), torch.zeros(len(ids), width, dtype=torch.long)
    for b, row in enumerate(ids):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        rows[b, at], mask[b, at] = torch.tensor(row), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=rows, attention_mask=mask, position_ids=positions).logits
    return [row[real.bool()] for row, real in zip(logits, mask, strict=True)]


def z_of(norms: Sequence[float]) -> list[float]:
    """z-scores of one unpadded sequence, with the sample standard deviation."""
    mean, deviation = statistics.fmean(norms), statistics.stdev(norms)
    return [(s - mean) / deviation for s in norms]


def ceiling_of(n: int) -> float:
    """The largest z among n numbers: one is 1, the others are 0."""
    return z_of([0.0] * (n - 1) + [1.0])[-1]


def weight_of(projection: nn.Module) -> np.ndarray:
    """W0 (d, m) in float64, whichever way round it is stored."""
    weight = projection.weight.detach().double().numpy()  # type: ignore[operator,union-attr]
    return weight if isinstance(projection, nn.Linear) else weight.T


def leverages(keys: np.ndarray, edited: np.ndarray, c0: np.ndarray, ridge: float) -> np.ndarray:
    """(n,): the leverage score of keys (n, m) after edits of keys (r, m), in the metric A = diag(C0 + a little)^-1."""
    moments = np.diag(c0)
    metric = np.diag(1 / (moments + 1e-4 * moments.mean()))  # (m, m)
    found = []
    unit = [k / np.sqrt(k @ metric @ k) for k in edited]
    gram = np.array([[p @ metric @ q for q in unit] for p in unit]).reshape(len(unit), len(unit))
    for key in keys:
        overlap = np.array([q @ metric @ key for q in unit])
        inner = overlap @ np.linalg.solve(gram + ridge * np.eye(len(gram)), overlap)
        found.append(inner / (key @ metric @ key))
    return np.array(found)


def logit(share: float) -> float:
    return float(np.log(share / (1 - share)))


class PlainEditor:
    """Batches of edits as METHOD says them, on a copy of the model: one text at a time, numpy and loops.

    It is handed the target values, which have an oracle of their own, and C0.

    Args:
        texts: rows of pre-training token ids, for the leverage rule.
    """

    def __init__(
        self,
        session: EditSession,
        model: Any,
        c0: dict[int, np.ndarray],
        projections: list[str],
        texts: Sequence[list[int]] = (),
    ) -> None:
        self.hparams = hparams = session.hparams
        self.model, self.tokenizer, self.layers = model, session.tokenizer, hparams.layers
        self.prefixes = hparams.context_prefixes or []
        self.projections = {layer: model.get_submodule(n) for layer, n in zip(self.layers, projections, strict=True)}
        self.block = model.get_submodule(projections[-1].rsplit(".", 2)[0])
        self.w0 = {layer: weight_of(p) for layer, p in self.projections.items()}
        self.wh = {layer: w.copy() for layer, w in self.w0.items()}
        self.c0 = c0
        self.c = {layer: hparams.mom2_update_weight * c0[layer] for layer in self.layers}
        self.alpha = dict.fromkeys(self.layers, hparams.alpha)
        self.ratio = dict.fromkeys(self.layers, hparams.short_prompt_ratio)
        self.mode = dict.fromkeys(self.layers, "off")
        self.seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # keys (T, m) and norms (T,) of the last text
        for layer, projection in self.projections.items():
            projection.register_forward_hook(self._hook(layer))
        self.edited: list[np.ndarray] = []  # mean keys at the first layer
        self.witnesses: list[np.ndarray] = []  # keys there in each context
        self.threshold = np.inf
        self.open: list[bool] = []  # what the first layer decided for the last text
        self.pre_training = np.array([key for row in texts for key in self._first_keys(row)])

    def _first_keys(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            self.model(input_ids=torch.tensor([ids]))
        return self.seen[self.layers[0]][0]

    def _hook(self, layer: int) -> Callable[..., torch.Tensor]:
        def answer(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            keys = inputs[0][0].detach().double().numpy()  # (T, m)
            base = output[0].detach().double().numpy()  # (T, d), with its bias
            edited = base + keys @ (self.wh[layer] - self.w0[layer]).T
            norms = [float(np.linalg.norm(o - p)) for o, p in zip(edited, base, strict=True)]
            self.seen[layer] = keys, np.array(norms)
            if self.mode[layer] == "off":
                return output
            open_ = [True] * len(keys)
            if self.mode[layer] == "validated" and self.hparams.use_hooks:
                open_ = self._opens(layer, keys, norms)
            rows = [e if wanted else b for e, b, wanted in zip(edited, base, open_, strict=True)]
            return torch.tensor(np.array(rows))[None].to(output.dtype)

        return answer

    def _opens(self, layer: int, keys: np.ndarray, norms: list[float]) -> list[bool]:
        if self.hparams.scope == "zscore":
            asked = min(self.alpha[layer], self.ratio[layer] * ceiling_of(len(norms)))
            return [z >= asked for z in (z_of(norms) if max(norms) > 0 else [-np.inf] * len(norms))]
        if layer == self.layers[0]:
            scores = leverages(keys, np.array(self.edited), self.c0[layer], self.hparams.scope_ridge)
            self.open = [bool(score >= self.threshold) for score in scores]
        return self.open

    @torch.no_grad()
    def run(self, text: str) -> np.ndarray:
        """The last edited block's output (T, d)."""
        kept: list[torch.Tensor] = []
        handle = self.block.register_forward_hook(
            lambda _, __, answer: kept.append(answer[0] if isinstance(answer, tuple) else answer)
        )
        self.model(input_ids=torch.tensor([self.tokenizer(text)["input_ids"]]))
        handle.remove()
        return kept[0][0].double().numpy()

    def at(self, prefix: str, fact: dict[str, str]) -> tuple[str, int]:
        """The text, and the index of the subject's last token: tokenise up to there and count."""
        text = prefix + fact["prompt"]
        stop = text.rindex(fact["subject"]) + len(fact["subject"])
        return text, len(self.tokenizer(text[:stop])["input_ids"]) - 1

    def edit(self, facts: Sequence[dict[str, str]], targets: np.ndarray, accumulate: bool = True) -> None:
        """targets: (d, u)."""
        self.mode = dict.fromkeys(self.layers, "temporary")
        for i, layer in enumerate(self.layers):
            keys, residuals = [], []
            for fact, target in zip(facts, targets.T, strict=True):
                text, at = self.at("", fact)
                current = self.run(text)[at]
                plain, prefixed = self.seen[layer][0][at], []
                for prefix in self.prefixes:
                    text, at = self.at(prefix, fact)
                    self.run(text)
                    prefixed.append(self.seen[layer][0][at])
                keys.append((plain + sum(prefixed) / len(prefixed)) / 2 if prefixed else plain)
                if i == 0:
                    self.witnesses += [plain, *prefixed]
                residuals.append((target - current) / (len(self.layers) - i))
            if i == 0:
                self.edited += keys
                if len(self.pre_training):
                    self._meet_openings(facts, keys)
                    self._move_threshold()
            k, r = np.array(keys).T, np.array(residuals).T  # (m, u), (d, u)
            delta = np.zeros_like(self.wh[layer])
            inverse = np.linalg.inv(self.c[layer] + sum(np.outer(column, column) for column in k.T))
            for u in range(k.shape[1]):
                delta += np.outer(r[:, u], k[:, u]) @ inverse
            self.wh[layer] = self.wh[layer] + delta
            if accumulate:
                for column in k.T:
                    self.c[layer] = self.c[layer] + np.outer(column, column)
            self.mode[layer] = "validated"

    def _meet_openings(self, facts: Sequence[dict[str, str]], means: Sequence[np.ndarray]) -> None:
        """Keys of subjects that begin a text, unless like the mean ones or like too much of the pre-training text."""
        moments = np.diag(self.c0[self.layers[0]])
        metric = 1 / (moments + 1e-4 * moments.mean())

        def alike(one: np.ndarray, other: np.ndarray) -> float:
            return float((one * metric @ other) ** 2 / (one * metric @ one) / (other * metric @ other))

        for fact, mean in zip(facts, means, strict=True):
            self.run(fact["subject"])
            key = self.seen[self.layers[0]][0][-1]
            like_it = [text for text in self.pre_training if alike(text, key) >= 0.25]
            if alike(key, mean) < 0.6 and len(like_it) <= self.hparams.scope_budget * len(self.pre_training):
                self.edited.append(key)
                self.witnesses.append(key)

    def _move_threshold(self) -> None:
        """Midway in log odds between a low quantile of edited keys and a high one of pre-training; not below that."""
        c0, edited, ridge = self.c0[self.layers[0]], np.array(self.edited), self.hparams.scope_ridge
        low = np.quantile(leverages(np.array(self.witnesses), edited, c0, ridge), 0.02)
        rest = sorted(leverages(self.pre_training, edited, c0, ridge), reverse=True)
        first_too_many = rest[int(self.hparams.scope_budget * len(rest))]
        midway = 1 / (1 + np.exp(-(logit(low) + logit(first_too_many)) / 2))
        self.threshold = max(first_too_many * 1.001, midway, 0.25 / (1 + ridge))

    def lower_thresholds(self, facts: Sequence[dict[str, str]], margin: float) -> None:
        for layer in self.layers:
            alpha, ratio = self.alpha[layer], self.ratio[layer]
            for fact in facts:
                for text in (fact["prompt"], f"{fact['prompt']} {fact['target_new']}"):
                    self.run(text)
                    norms = self.seen[layer][1]
                    top, attainable = max(z_of(list(norms))), ceiling_of(len(norms))
                    if alpha <= ratio * attainable:
                        self.alpha[layer] = min(self.alpha[layer], top * (1 - margin))
                    else:
                        self.ratio[layer] = min(self.ratio[layer], top / attainable * (1 - margin))


@contextmanager
def raising_at(
    monkeypatch: Any, owner: Any, name: str, call: int, error: BaseException, after: bool = False
) -> Iterator[list[int]]:
    """`owner.name` raises `error` at its `call`-th call (from 0), before or after doing its work."""
    original, calls = getattr(owner, name), [0]

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] - 1 == call and not after:
            raise error
        answer = original(*args, **kwargs)
        if calls[0] - 1 == call:
            raise error
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, patched)
        yield calls
