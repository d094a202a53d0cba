"""The z-score scope, the rule of the paper (section 3.3).

For every token of a sequence, s = ||Wh k - W0 k||_2 and z is s standardised over the tokens of that sequence. A token
whose z reaches alpha is inside the scope. Alpha falls to the smallest maximum seen among the prompts edited so far, so
that every edited prompt stays inside.

Policies the paper leaves open:

* Padding takes no part: statistics run over the real tokens of a row, whatever its batch mates are.
* The largest z that n tokens can reach is (n - 1) / sqrt(n), 2.04 for n = 6. A prompt is therefore asked for the lower
  of alpha and `ratio` times that ceiling. Prompts for which alpha is the lower bound lower alpha; shorter ones lower
  `ratio` and leave alpha alone.
* One token has no deviation and two tokens always score -0.71 and 0.71: fewer than three tokens are outside. The
  tokens of one pass are judged together: in cached decoding those of the prompt, while each generated one comes alone
  and is outside. Drafts of assisted decoding come together, so that it may say something else than plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from .gate import Gate, Scope
from .token_mask import TokenMask

MIN_TOKENS = 3

# A prompt that set alpha must pass it again in another batch layout, where sums round differently.
ROUNDING_MARGIN = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Thresholds:
    """What is asked of a token."""

    alpha: float
    ratio: float  # share of the attainable z, for sequences too short to reach alpha


def z_scores(norms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Standardise s over the real tokens of each row, with the sample standard deviation.

    Args:
        norms: (b, T), s = ||Wh k - W0 k|| of each token.
        mask: (b, T), True at real tokens.

    Returns:
        (b, T); -inf at padding, and throughout rows with fewer than three tokens or no deviation.
    """
    s = norms.double() if norms.device.type != "mps" else norms.float()  # (b, T)
    s = s.masked_fill(~mask, 0.0)
    n = mask.sum(-1, keepdim=True)  # (b, 1)
    mean = s.sum(-1, keepdim=True) / n.clamp(min=1)
    deviation = (s - mean).masked_fill(~mask, 0.0)
    std = (deviation.square().sum(-1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    # Equal norms (a token repeated) still differ by float32's rounding; that is no deviation.
    scored = mask & (n >= MIN_TOKENS) & (std > 1e-5 * mean.abs())
    return torch.where(scored, deviation / std.clamp(min=torch.finfo(s.dtype).tiny), -torch.inf)


def ceiling(n: torch.Tensor) -> torch.Tensor:
    """The largest z that one of n tokens can reach."""
    n = n.double() if n.device.type != "mps" else n.float()
    return (n - 1) / n.clamp(min=1).sqrt()


def asked(mask: torch.Tensor, alpha: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """(b, 1): the z that a token of each row must reach. Arguments as in `in_scope`."""
    return torch.minimum(alpha, ratio * ceiling(mask.sum(-1, keepdim=True)))


def in_scope(norms: torch.Tensor, mask: torch.Tensor, alpha: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """(b, T) bool: the tokens that the hook layer answers. Shapes as in `z_scores`; alpha and ratio are scalars."""
    return z_scores(norms, mask) >= asked(mask, alpha, ratio)


def lowered(thresholds: Thresholds, norms: torch.Tensor, mask: torch.Tensor, margin: float) -> Thresholds:
    """Dynamic alpha: alpha = min(alpha, min over prompts of the maximum z over tokens), short prompts apart.

    Args:
        norms, mask: (u, T) of the edited prompts, as in `z_scores`.
        margin: relative allowance for rounding, see `ROUNDING_MARGIN`.
    """
    top = z_scores(norms, mask).max(-1).values.cpu()  # (u,)
    attainable = ceiling(mask.sum(-1)).cpu()  # (u,)
    alpha, ratio = thresholds.alpha, thresholds.ratio
    scored = top > 0  # a prompt without a score can say nothing about the threshold
    long = thresholds.alpha <= thresholds.ratio * attainable
    if (scored & long).any():
        alpha = min(alpha, float(top[scored & long].min()) * (1 - margin))
    if (scored & ~long).any():
        ratio = min(ratio, float((top / attainable)[scored & ~long].min()) * (1 - margin))
    return Thresholds(alpha, ratio)


@dataclass(frozen=True)
class ZScoreState:
    """What is asked at every edited layer."""

    thresholds: dict[int, Thresholds]


class ZScoreGate(Gate):
    """Decides for one layer, comparing ||Delta k|| over the tokens of each row."""

    alpha: torch.Tensor  # ()
    ratio: torch.Tensor  # ()

    def __init__(self, tokens: TokenMask, thresholds: Thresholds, device: torch.device) -> None:
        super().__init__()
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.register_buffer("alpha", torch.tensor(thresholds.alpha, dtype=wide, device=device))
        self.register_buffer("ratio", torch.tensor(thresholds.ratio, dtype=wide, device=device))
        self.observer: Callable[[torch.Tensor, torch.Tensor], None] | None = None  # called with s and mask, (b, T)
        self._tokens = tokens

    def set_thresholds(self, thresholds: Thresholds) -> None:
        self.alpha = torch.full_like(self.alpha, thresholds.alpha)
        self.ratio = torch.full_like(self.ratio, thresholds.ratio)

    def forward(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        norms, mask = self._norms(key, change)
        if self.observer is not None:
            self.observer(norms, mask)
        return in_scope(norms, mask, self.alpha, self.ratio).view(*key.shape[:-1], 1)

    def margin(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor:
        norms, mask = self._norms(key, change)
        needed = asked(mask, self.alpha, self.ratio).clamp(min=1e-9)  # (b, 1)
        return (z_scores(norms, mask) / needed).view(key.shape[:-1])

    def _norms(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """s = ||Delta k|| and which tokens are real, (b, T) each."""
        delta_k = change()  # (b, T, d), or (b T, d) from blocks that flatten their tokens
        mask = self._tokens.of(key)
        wide = torch.promote_types(delta_k.dtype, torch.float32)
        return torch.linalg.vector_norm(delta_k, dim=-1, dtype=wide).view(mask.shape), mask

    def extra_repr(self) -> str:
        return f"scope=zscore, alpha={self.alpha.item():.3f}"


class ZScoreScope(Scope):
    """The paper's rule on one model.

    Args:
        layers: the edited layers.
        start: what is asked before any edit.
        dynamic: lower alpha with the edits; off, it stays (an ablation).
    """

    looks_ahead = True

    def __init__(self, model: nn.Module, layers: list[int], start: Thresholds, dynamic: bool) -> None:
        self._model, self._layers, self._start, self._dynamic = model, layers, start, dynamic
        self._tokens: TokenMask | None = None

    def initial(self) -> ZScoreState:
        return ZScoreState(dict.fromkeys(self._layers, self._start))

    def attach(self) -> None:
        self._tokens = TokenMask(self._model)

    def release(self) -> None:
        if self._tokens is not None:
            self._tokens.remove()
            self._tokens = None

    def gate(self, layer: int) -> Gate:
        assert self._tokens is not None, "attach first"
        return ZScoreGate(self._tokens, self._start, next(self._model.parameters()).device)

    def show(self, layer: int, gate: Gate, state: ZScoreState) -> None:
        assert isinstance(gate, ZScoreGate)
        gate.set_thresholds(state.thresholds[layer])

    def after_write(self, layer: int, state: ZScoreState, norms: torch.Tensor, mask: torch.Tensor) -> ZScoreState:
        if not self._dynamic:
            return state
        dtype = next(self._model.parameters()).dtype
        margin = ROUNDING_MARGIN.get(dtype, max(ROUNDING_MARGIN.values()))
        now = lowered(state.thresholds[layer], norms, mask, margin)
        return replace(state, thresholds={**state.thresholds, layer: now})

    def asked(self, state: ZScoreState) -> float:
        return min(thresholds.alpha for thresholds in state.thresholds.values())

    def pack(self, state: ZScoreState) -> dict[str, torch.Tensor]:
        rows = [state.thresholds[layer] for layer in self._layers]
        return {
            "alpha": torch.tensor([row.alpha for row in rows], dtype=torch.float64),
            "ratio": torch.tensor([row.ratio for row in rows], dtype=torch.float64),
        }

    def unpack(self, tensors: dict[str, torch.Tensor]) -> ZScoreState:
        rows = zip(tensors["alpha"].tolist(), tensors["ratio"].tolist(), strict=True)
        return ZScoreState({layer: Thresholds(*row) for layer, row in zip(self._layers, rows, strict=True)})
