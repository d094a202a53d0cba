"""The leverage scope: a token is answered if the edited keys account for enough of its key.

Keys are compared in the coordinates that make pre-training keys white, w = L^-1 k with C0 = L L^T, where unrelated
keys are nearly orthogonal. With the edited keys q_i scaled to length one there, Q = [q_1 ... q_r],

    leverage(k) = w^T Q (eps I + Q^T Q)^-1 Q^T w / w^T w

is the share of the key that lies in what was edited: the ridge leverage score of regression. One edited key alone has
1 / (1 + eps); an unrelated key about r / m after r edits.

The decision falls at the first edited layer, whose keys no edit changes, and holds for the later layers. It depends on
that token's key alone: not on padding, batch mates, length, later tokens or caching.

The threshold lies midway (in log odds) between a low quantile of the edited facts' keys, in all their contexts, and
the pre-training keys' quantile that leaves `budget` of them open; it never falls below the latter. Nothing here grows
without bound: Q is at most (m, m), and the keys looked at for the quantile are a random sample of fixed size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..memory import NOT_POSITIVE, context_mean, working_precision
from .gate import Gate, Scope

WITNESSES = 512  # keys of edited facts that the threshold is taken from
QUANTILE = 0.02  # of them may stay outside: the odd one must not open the scope for everything
MARGIN = 1e-3  # relative, for sums that round differently in another batch layout
SHRINKAGE = 1e-4  # ridge of C0, as a share of its mean diagonal


@dataclass(frozen=True)
class LeverageState:
    """What the edits so far have made of the scope."""

    edited: torch.Tensor  # (m, r): Q, or once r would exceed m, an (m, m) factor of Q Q^T
    witnesses: torch.Tensor  # (w, m): white keys of edited facts in their contexts, a uniform sample
    lots: torch.Tensor  # (w,): the lots by which the sample was drawn
    seen: int  # keys the sample was drawn from
    threshold: float


class Decision:
    """What the first edited layer decided in the running forward pass."""

    def __init__(self) -> None:
        self.open: torch.Tensor | None = None  # (..., 1)


class LeverageGate(Gate):
    """Decides at the first edited layer."""

    # Both up to one common factor, see `_scaled`.
    whiten: torch.Tensor  # (m, m): L^-1
    explain: torch.Tensor  # (r, m): F L^-1, see `explaining`
    threshold: torch.Tensor  # ()
    growing = frozenset({"explain"})

    def __init__(self, whiten: torch.Tensor, decision: Decision) -> None:
        super().__init__()
        self._decision = decision
        self.register_buffer("whiten", whiten)
        self.register_buffer("explain", whiten.new_zeros(0, whiten.shape[1]))
        self.register_buffer("threshold", whiten.new_tensor(torch.inf))

    def forward(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        self._decision.open = (self.margin(key, change) >= 1).unsqueeze(-1)
        return self._decision.open

    def margin(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor:
        wide = torch.promote_types(key.dtype, torch.float32)
        explained, whole = (
            torch.linalg.vector_norm(F.linear(key, self.in_dtype(name, key.dtype)), dim=-1, dtype=wide)
            for name in ("explain", "whiten")
        )
        share: torch.Tensor = (explained / whole.clamp(min=torch.finfo(wide).tiny)).square()  # 0 for a zero key
        return share / self.threshold

    def extra_repr(self) -> str:
        return f"scope=leverage, threshold={self.threshold.item():.3f}, rank={len(self.explain)}"


class FollowingGate(Gate):
    """Repeats what the first edited layer decided."""

    def __init__(self, decision: Decision, last: bool) -> None:
        super().__init__()
        self._decision, self._last = decision, last

    def forward(self, key: torch.Tensor, change: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        open_ = self._decision.open
        if self._last and not self.training:  # training may run a block once more (gradient checkpointing)
            self._decision.open = None
        if open_ is None or open_.shape[:-1] != key.shape[:-1]:
            return None  # a block run by itself: nobody has decided
        return open_.to(key.device)

    def extra_repr(self) -> str:
        return "scope=leverage, decided at the first edited layer"


class LeverageScope(Scope):
    """The leverage rule on one model.

    Args:
        layers: the edited layers.
        c0: (m, m), E[k k^T] at the first of them.
        sample: (n, m), pre-training keys there.
        budget: share of pre-training tokens that may open.
        ridge: eps.
    """

    looks_ahead = False

    def __init__(
        self, layers: list[int], c0: torch.Tensor, sample: torch.Tensor, budget: float, ridge: float, seed: int = 0
    ) -> None:
        self.first, self.last = layers[0], layers[-1]
        self.budget, self.ridge, self.seed = budget, ridge, seed
        self.whiten = whitening(c0).contiguous()  # (m, m), laid out as it comes back from a file
        self._pre_training = (working_precision(sample.to(self.whiten.device)) @ self.whiten.T).float()  # (n, m)
        self._decision = Decision()

    def initial(self) -> LeverageState:
        m = len(self.whiten)
        empty = self.whiten.new_zeros(0, m)
        return LeverageState(empty.T, empty.float(), torch.zeros(0), 0, torch.inf)

    def gate(self, layer: int) -> Gate:
        if layer == self.first:
            return LeverageGate(self._scaled(self.whiten), self._decision)
        return FollowingGate(self._decision, layer == self.last)

    def show(self, layer: int, gate: Gate, state: LeverageState) -> None:
        if isinstance(gate, LeverageGate):
            device = gate.whiten.device
            explain = explaining(state.edited, self.ridge) @ self.whiten  # (r, m)
            gate.explain = self._scaled(explain).to(device)
            gate.threshold = torch.full_like(gate.threshold, state.threshold)

    def after_keys(self, state: LeverageState, keys: torch.Tensor) -> LeverageState:
        keys = working_precision(keys.to(self.whiten.device))  # (u, c, m)
        white = keys @ self.whiten.T
        mean = context_mean(white)  # (u, m)
        edited = torch.cat([state.edited, F.normalize(mean, dim=-1).T], dim=1)  # (m, r + u)
        if edited.shape[1] > edited.shape[0]:
            edited = torch.linalg.qr(edited.T, mode="r").R.T  # (m, m), the same Q Q^T
        witnesses, lots = self._sampled(state, white.flatten(0, 1).float())
        explain = explaining(edited, self.ridge)
        threshold = self._threshold(leverage(witnesses, explain), leverage(self._pre_training, explain))
        return LeverageState(edited, witnesses, lots, state.seen + keys.shape[0] * keys.shape[1], threshold)

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
        device = self.whiten.device
        return LeverageState(
            edited=tensors["edited"].T.contiguous().to(device),
            witnesses=tensors["witnesses"].to(device),
            lots=tensors["lots"],
            seen=int(tensors["seen"]),
            threshold=float(tensors["threshold"]),
        )

    def constants(self) -> dict[str, torch.Tensor]:
        return {"whiten": self.whiten, "pre_training": self._pre_training}

    @classmethod
    def of_constants(
        cls, layers: list[int], constants: dict[str, torch.Tensor], budget: float, ridge: float, seed: int
    ) -> LeverageScope:
        """The scope with these `constants`; without any it cannot learn, but its gates can be given buffers."""
        scope = cls(layers, torch.eye(1), torch.ones(1, 1), budget, ridge, seed)
        if constants:
            scope.whiten, scope._pre_training = constants["whiten"], constants["pre_training"]
        return scope

    def _sampled(self, state: LeverageState, white: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Witnesses and their lots after `white` (n, m) came by: those with the lowest lots of all so far."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.seen)
        lots = torch.cat([state.lots, torch.rand(len(white), generator=generator)])
        kept = lots.argsort()[:WITNESSES].sort().values
        return torch.cat([state.witnesses, white])[kept.to(white.device)], lots[kept]

    def _threshold(self, edited: torch.Tensor, pre_training: torch.Tensor) -> float:
        # The first value that leaves too many open, and a little more: keys can be equal (the first tokens of texts).
        excess = pre_training.sort(descending=True).values[int(self.budget * len(pre_training))]
        floor = float(excess) * (1 + MARGIN)
        low = edited.quantile(QUANTILE)
        midway = torch.stack([low, excess]).logit(eps=1e-6).mean().sigmoid()
        return max(float(midway), floor)

    def _scaled(self, matrix: torch.Tensor) -> torch.Tensor:
        # So that the entries of both matrices fit 16 bits; their quotient does not notice.
        return (matrix / self.whiten.abs().max()).float()


def whitening(c0: torch.Tensor) -> torch.Tensor:
    """L^-1 (m, m) with L L^T = C0 + a small ridge: the map to coordinates where pre-training keys are white."""
    c0 = working_precision(c0)
    identity = torch.eye(len(c0)).to(c0)
    factor, info = torch.linalg.cholesky_ex(c0 + SHRINKAGE * c0.diagonal().mean() * identity)
    if info.item() != 0:
        raise ValueError(NOT_POSITIVE)
    white: torch.Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return white


def explaining(edited: torch.Tensor, ridge: float) -> torch.Tensor:
    """F (r, m) with ||F w||^2 = w^T Q (eps I + Q^T Q)^-1 Q^T w, for Q = `edited` (m, r)."""
    gram = edited.T @ edited  # (r, r)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram)).to(gram))
    explain: torch.Tensor = torch.linalg.solve_triangular(factor, edited.T, upper=False)
    return explain


def leverage(white: torch.Tensor, explain: torch.Tensor) -> torch.Tensor:
    """(n,) leverage of white keys (n, m), for F = `explain` (r, m)."""
    explained = (white @ explain.T.to(white)).square().sum(-1)
    return explained / white.square().sum(-1).clamp(min=torch.finfo(white.dtype).tiny)
