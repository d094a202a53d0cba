"""The leverage scope: a token is answered if the edited keys account for enough of its key.

Keys are compared with every neuron scaled to a mean square of one over pre-training text, w_i = k_i / sqrt(C0_ii),
where unrelated keys are nearly orthogonal. With the edited keys q_i scaled to length one there, Q = [q_1 ... q_r],

    leverage(k) = w^T Q (eps I + Q^T Q)^-1 Q^T w / w^T w

is the share of the key that lies in what was edited: the ridge leverage score of regression. One edited key alone has
1 / (1 + eps); an unrelated key about r / m after r of them.

A fact's edited key is the mean of its keys in all contexts, as it is written; and beside it, where the two are not
much alike, the key of its subject at the beginning of a text, where questions often begin and where keys differ from
those elsewhere. A subject of one token has no such key: first tokens are all alike.

The decision falls at the first edited layer, whose keys no edit changes, and holds for the later layers. It depends on
that token's key alone: not on padding, batch mates, length, later tokens or caching.

The threshold lies midway (in log odds) between a low quantile of the edited facts' keys, in all their contexts, and
the pre-training keys' quantile that leaves `budget` of them open; it never falls below the latter, nor `LEAST`.

Nothing here grows without bound: the keys looked at for the quantile are a random sample of fixed size, and Q has at
most 2 m columns. Beyond that an (m, m) matrix with the same Q Q^T, which is all that the score depends on, takes its
place. That happens once in m edits: in every other step a session's journal keeps the keys of the batch alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..memory import context_mean, working_precision
from .gate import Gate, Scope

ALIKE = 0.6  # squared cosine from which on the mean key stands for the opening one
WITNESSES = 512  # keys of edited facts that the threshold is taken from
QUANTILE = 0.02  # of them may stay outside: the odd one must not open the scope for everything
LEAST = 0.25  # of what an edited key has: after few edits no other text looks like them, but their neighbours do
MARGIN = 1e-3  # relative, for sums that round differently in another batch layout
SILENT = 1e-4  # added to every neuron's mean square, as a share of their mean: some never fired in the sample


@dataclass(frozen=True)
class LeverageState:
    """What the edits so far have made of the scope."""

    edited: torch.Tensor  # (m, r): Q; where r would exceed 2 m, an (m, m) factor of Q Q^T and what came since
    witnesses: torch.Tensor  # (w, m): scaled keys of edited facts in their contexts, a uniform sample
    lots: torch.Tensor  # (w,): the lots by which the sample was drawn
    seen: int  # keys the sample was drawn from
    threshold: float


class _OfThread(threading.local):
    open: torch.Tensor | None = None  # (..., 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy of the model has not begun a pass


class Decision:
    """What the first edited layer decided in the running forward pass; threads may run one model at once.

    Compiled code cannot tell threads apart, and some blocks of a model may be compiled while others are not.
    """

    def __init__(self) -> None:
        self._of_thread = _OfThread()
        self._of_all: torch.Tensor | None = None  # by whichever thread was last
        self._compiled = False  # whether compiled code made that

    def tell(self, open_: torch.Tensor, training: bool) -> None:
        """Decide (..., 1) for the layers above."""
        self._of_all, self._compiled = open_, torch.compiler.is_compiling()
        if not (training or self._compiled):
            self._of_thread.open = open_

    def told(self, training: bool, last: bool) -> torch.Tensor | None:
        """What was decided; None: nothing yet. The `last` to ask ends the pass."""
        # Gradient checkpointing may run a block once more, after the pass and in a thread of autograd's.
        if training:
            return self._of_all
        shared = torch.compiler.is_compiling() or self._compiled
        open_ = self._of_all if shared else self._of_thread.open
        if last:
            self._of_all = None
            if not torch.compiler.is_compiling():
                self._of_thread.open = None
        return open_


class LeverageGate(Gate):
    """Decides at the first edited layer."""

    scale: torch.Tensor  # (m,): what makes w of k, up to a common factor
    explain: torch.Tensor  # (r, m), r <= m: F, see `explaining`; entries are at most 1, and 16 bits do to keep them
    threshold: torch.Tensor  # ()
    growing = frozenset({"explain"})

    def __init__(self, scale: torch.Tensor, decision: Decision) -> None:
        super().__init__()
        self._decision = decision
        self.register_buffer("scale", scale)
        self.register_buffer("explain", torch.zeros(0, len(scale), dtype=torch.float16, device=scale.device))
        self.register_buffer("threshold", scale.new_tensor(torch.inf))

    def forward(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        open_ = (self.margin(key, change) >= 1).unsqueeze(-1)
        self._decision.tell(open_, self.training)
        return open_

    def margin(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor:
        wide = torch.promote_types(key.dtype, torch.float32)  # as the threshold was found
        with torch.autocast(key.device.type, enabled=False):
            scaled = key.to(wide) * self.in_dtype("scale", wide)
            return leverage(scaled, self.in_dtype("explain", wide)) / self.threshold

    def extra_repr(self) -> str:
        return f"scope=leverage, threshold={self.threshold.item():.3f}, rank={len(self.explain)}"


class FollowingGate(Gate):
    """Repeats what the first edited layer decided."""

    def __init__(self, decision: Decision, last: bool) -> None:
        super().__init__()
        self._decision, self._last = decision, last

    def decided(self, tokens: torch.Size, last: bool = False) -> torch.Tensor | None:
        """(*tokens, 1): what the first edited layer decided in the running pass. The `last` to ask ends the pass.

        None: nobody has decided, as where a block is run by itself; or for other tokens, in a pass that was stopped.
        """
        open_ = self._decision.told(self.training, last)
        return None if open_ is None or open_.numel() != tokens.numel() else open_.reshape(*tokens, 1)

    def decide(self, open_: torch.Tensor) -> None:
        """Take (..., 1) for its decision, in a pass that begins above it."""
        self._decision.tell(open_, self.training)

    def forward(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        open_ = self.decided(key.shape[:-1], self._last)
        return None if open_ is None else open_.to(key.device)

    def extra_repr(self) -> str:
        return "scope=leverage, decided at the first edited layer"


class LeverageScope(Scope):
    """The leverage rule on one model.

    Args:
        layers: the edited layers.
        moments: (m,), E[k_i^2] of each neuron at the first of them: the diagonal of C0.
        sample: (n, m), pre-training keys there.
        budget: share of pre-training tokens that may open.
        ridge: eps.
    """

    looks_ahead = False

    def __init__(
        self,
        layers: list[int],
        moments: torch.Tensor,
        sample: torch.Tensor,
        budget: float,
        ridge: float,
        seed: int = 0,
    ) -> None:
        self.first, self.last = layers[0], layers[-1]
        self.budget, self.ridge, self.seed = budget, ridge, seed
        self.scale = scaling(moments)  # (m,)
        self._pre_training = (working_precision(sample.to(self.scale.device)) * self.scale).float()  # (n, m)
        self._decision = Decision()

    def initial(self) -> LeverageState:
        empty = self.scale.new_zeros(0, len(self.scale))
        return LeverageState(empty.T, empty.float(), torch.zeros(0), 0, torch.inf)

    def gate(self, layer: int) -> Gate:
        if layer == self.first:
            in_range = self.scale / self.scale.max()  # in 16 bits too
            return LeverageGate(in_range.float(), self._decision)
        return FollowingGate(self._decision, layer == self.last)

    def show(self, layer: int, gate: Gate, state: LeverageState) -> None:
        if isinstance(gate, LeverageGate):
            gate.explain = self._explaining(state.edited).to(gate.scale.device)
            gate.threshold = torch.full_like(gate.threshold, state.threshold)

    def after_keys(self, state: LeverageState, keys: torch.Tensor, opening: torch.Tensor) -> LeverageState:
        scaled = working_precision(keys.to(self.scale.device)) * self.scale  # (u, c, m)
        mean = F.normalize(context_mean(scaled), dim=-1)  # (u, m)
        opening = working_precision(opening.to(self.scale.device)) * self.scale  # (u, m)
        opening = opening[self._stands_apart(opening, mean)]  # (o, m), o <= u
        edited = torch.cat([state.edited, mean.T, F.normalize(opening, dim=-1).T], dim=1)  # (m, r + u + o)
        if edited.shape[1] > 2 * edited.shape[0]:
            edited = squared(edited)
        met = torch.cat([scaled.flatten(0, 1), opening]).float()
        witnesses, lots = self._sampled(state, met)
        explain = self._explaining(edited).float()
        threshold = self._threshold(leverage(witnesses, explain), leverage(self._pre_training, explain))
        return LeverageState(edited, witnesses, lots, state.seen + len(met), threshold)

    def asked(self, state: LeverageState) -> float:
        return state.threshold

    def pack(self, state: LeverageState) -> dict[str, torch.Tensor]:
        tensors = {
            "edited": state.edited.T,  # (r, m)
            "witnesses": state.witnesses,
            "lots": state.lots,
            "seen": torch.tensor(state.seen),
            "threshold": torch.tensor(state.threshold, dtype=torch.float64),
        }
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def unpack(self, tensors: dict[str, torch.Tensor]) -> LeverageState:
        device = self.scale.device
        return LeverageState(
            edited=tensors["edited"].T.contiguous().to(device),
            witnesses=tensors["witnesses"].to(device),
            lots=tensors["lots"],
            seen=int(tensors["seen"]),
            threshold=float(tensors["threshold"]),
        )

    def constants(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale, "pre_training": self._pre_training}

    @classmethod
    def of_constants(
        cls, layers: list[int], constants: dict[str, torch.Tensor], budget: float, ridge: float, seed: int
    ) -> LeverageScope:
        """The scope with these `constants`; without any it cannot learn, but its gates can be given buffers."""
        scope = cls(layers, torch.ones(1), torch.ones(1, 1), budget, ridge, seed)
        if constants:
            scope.scale, scope._pre_training = constants["scale"], constants["pre_training"]
        return scope

    def _stands_apart(self, opening: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """(u,) bool: opening keys (u, m) that are neither like the mean ones nor like more text than may open."""
        direction = F.normalize(opening, dim=-1)
        text = self._pre_training
        share = (F.linear(text, direction.float()) / text.norm(dim=1, keepdim=True)).square()  # (n, u)
        ordinary = (share >= LEAST).sum(0) > self.budget * len(text)
        unlike = (direction * mean).sum(-1).square() < ALIKE
        return torch.logical_and(unlike, ~ordinary)

    def _sampled(self, state: LeverageState, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Witnesses and their lots after `keys` (n, m) came by: those with the lowest lots of all so far."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.seen)
        lots = torch.cat([state.lots, torch.rand(len(keys), generator=generator)])
        kept = lots.argsort()[:WITNESSES].sort().values
        return torch.cat([state.witnesses, keys])[kept.to(keys.device)], lots[kept]

    def _threshold(self, edited: torch.Tensor, pre_training: torch.Tensor) -> float:
        # The first value that leaves too many open, and a little more: keys can be equal (the first tokens of texts).
        excess = pre_training.sort(descending=True).values[int(self.budget * len(pre_training))]
        floor = float(excess) * (1 + MARGIN)
        low = edited.quantile(QUANTILE)
        midway = torch.stack([low, excess]).logit(eps=1e-6).mean().sigmoid()
        return max(float(midway), floor, LEAST / (1 + self.ridge))

    def _explaining(self, edited: torch.Tensor) -> torch.Tensor:
        return explaining(edited, self.ridge).half().contiguous()  # as the gate has it, and a file gives it back


def scaling(moments: torch.Tensor) -> torch.Tensor:
    """(m,): the factors that give every neuron a mean square of one, for mean squares (m,)."""
    moments = working_precision(moments)
    return (moments + SILENT * moments.mean()).rsqrt()


def squared(edited: torch.Tensor) -> torch.Tensor:
    """(m, m) with the same Q Q^T as Q = `edited` (m, r), r >= m."""
    factor: torch.Tensor = torch.linalg.qr(edited.T, mode="r").R
    return factor.T


def explaining(edited: torch.Tensor, ridge: float) -> torch.Tensor:
    """F (min(r, m), m) with ||F w||^2 = w^T Q (eps I + Q^T Q)^-1 Q^T w, for Q = `edited` (m, r)."""
    if edited.shape[1] > edited.shape[0]:
        edited = squared(edited)
    gram = edited.T @ edited  # (r, r)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram)).to(gram))
    explain: torch.Tensor = torch.linalg.solve_triangular(factor, edited.T, upper=False)
    return explain


def leverage(scaled: torch.Tensor, explain: torch.Tensor) -> torch.Tensor:
    """(...) leverage of scaled keys (..., m), for F = `explain` (r, m) in their dtype."""
    explained, whole = (torch.linalg.vector_norm(part, dim=-1) for part in (F.linear(scaled, explain), scaled))
    share: torch.Tensor = (explained / whole.clamp(min=torch.finfo(whole.dtype).tiny)).square()  # 0 for a zero key
    return share
