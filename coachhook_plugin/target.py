"""Target values: what the last edited block should answer at the subject's last token (MEMIT's `compute_z.py`).

For each request an offset delta to the block's output v0 is found with Adam, minimising

    mean NLL of the target over context-prefixed prompts
    + kl_factor * KL(after || before) at the subject of "{subject} is a"
    + v_weight_decay * ||delta|| / ||v0||^2,      ||delta|| <= clamp_norm_factor * ||v0||.

A whole batch is optimised at once. The blocks up to the edited one do not depend on delta, so they run once; each step
runs the blocks above, and the vocabulary only at the tokens a loss is read from. Requests share no parameter and Adam
works element by element, so the result is that of optimising each request by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .architectures import ModelParts
from .head import Head, head_of
from .hparams import CoachHooKHparams
from .observation import Comparison, observe
from .tail import Tail, cut
from .tokens import Batch, Encoder, Places, Request, Row, micro_batches, place


@dataclass(frozen=True)
class Targets:
    """Target values of a batch."""

    values: torch.Tensor  # (d, u)
    nll: list[float]  # mean NLL of each target with its value in place
    steps: list[int]  # evaluations of the objective each request took
    trees: bool  # whether the model ran all their texts as token trees


@dataclass(frozen=True)
class _Problem:
    """One micro-batch: for each request its prefixed texts, then one "{subject} is a" row for each request."""

    batch: Batch
    owner: torch.Tensor  # (b,) request that a row belongs to
    last: torch.Tensor  # (b,) last position a loss is read from
    predict_row: torch.Tensor  # (p,) rows and positions that predict a target token ...
    predict_at: torch.Tensor  # (p,)
    wanted: torch.Tensor  # (p,) ... and that token
    weight: torch.Tensor  # (p,) 1 / (contexts of the request * tokens of its target)
    first_row: torch.Tensor  # (u,) the plain prompt
    kl_row: torch.Tensor  # (u,)

    def on(self, device: torch.device) -> _Problem:
        """The same beside the edited block's answers; the batch stays where the model takes it."""
        held = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "batch"}
        return replace(self, **{name: tensor.to(device) for name, tensor in held.items()})


@dataclass(frozen=True)
class _Group:
    """Rows that run together, and what is read from them; positions are the tail's, rows the group's."""

    tail: Tail
    owner: torch.Tensor  # (g,)
    subject: torch.Tensor  # (g,) where delta is added
    predict_row: torch.Tensor  # (p,)
    predict_at: torch.Tensor  # (p,)
    wanted: torch.Tensor  # (p,)
    weight: torch.Tensor  # (p,)
    kl_row: torch.Tensor  # (q,)


def optimise_targets(
    model: nn.Module,
    parts: ModelParts,
    encoder: Encoder,
    requests: Sequence[Request],
    prefixes: Sequence[str],
    hparams: CoachHooKHparams,
    layer: int,
    device: torch.device,
    progress: bool = True,
    comparison: Comparison | None = None,
    first: Places = 0,
) -> Targets:
    """Find the target value of every request. The model's parameters must not require gradients.

    Args:
        layer: the block whose output gets the value.
        comparison: see `tail.cut`; the same for all calls on one model.
        first: what messages call the requests, see `tokens.place`.

    Raises:
        ValueError: the objective of a request is not finite.
    """
    comparison = comparison or Comparison()
    rows = [
        [*(encoder.with_target(prefix, request) for prefix in ("", *prefixes)), encoder.essence(request)]
        for request in requests
    ]
    values, nll, steps, trees = [], [], [], True
    chunks = list(micro_batches(rows, hparams.target_tokens))
    bar = tqdm(total=len(chunks) * hparams.v_num_grad_steps, desc="targets", leave=False, disable=not progress)
    with bar:
        for chunk in chunks:
            problem = _problem(encoder, [rows[i] for i in chunk], device)
            names = [f"request {place(first, i)} ({requests[i].prompt!r})" for i in chunk]
            solved = _solve(model, parts, problem, names, hparams, layer, bar, comparison)
            values.append(solved.values)
            nll += solved.nll
            steps += solved.steps
            trees = trees and solved.trees
    return Targets(torch.cat(values, dim=1), nll, steps, trees)


def _problem(encoder: Encoder, rows: Sequence[Sequence[Row]], device: torch.device) -> _Problem:
    texts = [(i, row) for i, request in enumerate(rows) for row in request[:-1]]
    batch = encoder.batch(
        # The last target token predicts nothing.
        [Row(row.ids[:-1], row.subject) for _, row in texts] + [request[-1] for request in rows],
        device,
    )
    predict = [
        (b, t - 1, row.ids[t], 1 / (len(rows[i]) - 1) / len(row.target))
        for b, (i, row) in enumerate(texts)
        for t in row.target
    ]
    row, at, wanted, weight = zip(*predict, strict=True)
    contexts = len(texts) // len(rows)
    return _Problem(
        batch=batch,
        owner=torch.tensor([i for i, _ in texts] + list(range(len(rows))), device=device),
        last=torch.tensor([row.target.stop - 2 for _, row in texts] + [request[-1].subject for request in rows]),
        predict_row=torch.tensor(row, device=device),
        predict_at=torch.tensor(at, device=device),
        wanted=torch.tensor(wanted, device=device),
        weight=torch.tensor(weight, device=device),
        first_row=torch.arange(0, len(texts), contexts, device=device),
        kl_row=torch.arange(len(texts), len(texts) + len(rows), device=device),
    )


def _solve(
    model: nn.Module,
    parts: ModelParts,
    problem: _Problem,
    names: Sequence[str],
    hparams: CoachHooKHparams,
    layer: int,
    bar: Any,
    comparison: Comparison,
) -> Targets:
    last = len(parts.blocks) - 1
    loss_layer = last if hparams.v_loss_layer is None else hparams.v_loss_layer
    seen = observe(model, parts.blocks, layer, loss_layer, problem.batch, comparison)
    tail = cut(model, parts.blocks, layer, loss_layer, problem.batch, seen, comparison)
    head = head_of(model, parts, problem.batch, comparison)
    problem = problem.on(tail.hidden.device)
    subject = problem.batch.subject.to(tail.offset) - tail.offset  # (b,)
    v0 = tail.hidden[problem.first_row, subject[problem.first_row]].float()  # (u, d)
    longest = hparams.clamp_norm_factor * v0.norm(dim=1, keepdim=True)  # (u, 1)

    u, device = len(names), v0.device
    delta = torch.zeros_like(v0, requires_grad=True)  # (u, d)
    adam = torch.optim.Adam([delta], lr=hparams.v_lr, betas=(hparams.v_betas[0], hparams.v_betas[1]))
    active = torch.ones(u, dtype=torch.bool, device=device)
    running = active  # requests whose rows still run
    groups = _groups(problem, tail, running)
    before: dict[int, torch.Tensor] = {}  # log-probabilities that the KL term compares with, by request
    steps = torch.zeros(u, dtype=torch.long)
    nll = torch.zeros(u, device=device)

    for step in range(hparams.v_num_grad_steps):
        final = step == hparams.v_num_grad_steps - 1
        with torch.enable_grad():
            decay = hparams.v_weight_decay * delta.norm(dim=1) / v0.norm(dim=1).square()  # (u,)
        gradient = torch.autograd.grad(decay, delta, torch.ones_like(decay))[0]
        nll_now, loss = torch.zeros(u, device=device), decay.detach()
        for group in groups:
            with torch.enable_grad():
                nll_part, kl_part = _objective(head, group, delta, before)
                part = nll_part + hparams.kl_factor * kl_part  # (u,)
            nll_now, loss = nll_now + nll_part.detach(), loss + part.detach()
            if not final:
                gradient = gradient + torch.autograd.grad(part, delta, torch.ones_like(part))[0]
        for i in (running & ~loss.isfinite()).nonzero().flatten().tolist():
            raise ValueError(
                f"{names[i]}: the objective is {loss[i].item()} at step {step + 1}; lower v_lr or load the model in a "
                "wider dtype"
            )
        steps[active.cpu()] += 1
        nll = torch.where(active, nll_now, nll)
        bar.update()
        bar.set_postfix(nll=f"{nll.mean().item():.2f}", refresh=False)
        active = active & (loss >= hparams.v_loss_threshold) & (nll_now >= hparams.v_nll_threshold)
        if final or not active.any():
            bar.update(hparams.v_num_grad_steps - 1 - step)
            break
        with torch.no_grad():
            kept = delta.clone()
            delta.grad = gradient
            adam.step()
            delta *= (longest / delta.norm(dim=1, keepdim=True)).clamp(max=1)
            delta.copy_(torch.where(active[:, None], delta, kept))
        if active.sum() < running.sum():
            running = active
            groups = _groups(problem, tail, running)
    return Targets((v0 + delta.detach()).T, nll.tolist(), steps.tolist(), seen.tree)


def _groups(problem: _Problem, tail: Tail, running: torch.Tensor) -> list[_Group]:
    """The rows of the running requests: by length where padding costs time, all together elsewhere."""
    wanted_rows = running[problem.owner]
    lengths = (problem.last - tail.offset + 1).masked_fill(~wanted_rows, 0)  # (b,)
    together = tail.packs or tail.hidden.device.type != "cpu"
    alike = lengths.clamp(max=1) if together else lengths
    groups = []
    for label in set(alike[wanted_rows].tolist()):
        rows = (alike == label).nonzero().flatten()  # (g,)
        place = torch.full_like(lengths, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        predict = (place[problem.predict_row] >= 0).nonzero().flatten()
        kl = problem.kl_row[place[problem.kl_row] >= 0]
        groups.append(
            _Group(
                tail=tail.keep(rows, lengths[rows]),
                owner=problem.owner[rows],
                subject=(problem.batch.subject.to(tail.offset) - tail.offset)[rows],
                predict_row=place[problem.predict_row[predict]],
                predict_at=(problem.predict_at - tail.offset[problem.predict_row])[predict],
                wanted=problem.wanted[predict],
                weight=problem.weight[predict],
                kl_row=place[kl],
            )
        )
    return groups


def _objective(
    head: Head, group: _Group, delta: torch.Tensor, before: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u,) each: the group's share of every request's NLL (mean over its tokens and contexts), and of its KL."""
    hidden, rows = group.tail.hidden, torch.arange(len(group.owner), device=group.owner.device)
    added = delta.to(hidden.dtype)[group.owner]  # (g, d)
    for_loss, for_kl = (
        state.to(hidden.device)
        for state in group.tail(hidden.index_put((rows, group.subject), added, accumulate=True))
    )
    nll, kl = delta.new_zeros(len(delta)), delta.new_zeros(len(delta))
    if len(group.wanted):
        logits = head(for_loss[group.predict_row, group.predict_at]).float()  # (p, V)
        each = F.cross_entropy(logits, group.wanted.to(logits.device), reduction="none").to(delta.device)
        nll = nll.index_add(0, group.owner[group.predict_row], each * group.weight)
    if len(group.kl_row):
        owner = group.owner[group.kl_row]
        now = head(for_kl[group.kl_row, group.subject[group.kl_row]]).float().log_softmax(-1)  # (q, V)
        for i, row in zip(owner.tolist(), now.detach(), strict=True):
            before.setdefault(i, row)
        reference = torch.stack([before[i] for i in owner.tolist()])
        divergence = F.kl_div(reference, now, log_target=True, reduction="none").sum(-1).to(delta.device)
        kl = kl.index_add(0, owner, divergence)
    return nll, kl
