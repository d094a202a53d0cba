"""What one process of the benchmarks measures. Every job returns plain numbers; time is wall clock."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from coachhook_plugin import CoachHooKHparams, EditSession
from coachhook_plugin.architectures import key_size, model_parts
from coachhook_plugin.collection import collected_sums
from coachhook_plugin.text import text_source
from coachhook_plugin.trace import frozen

from ..data import HELD_TEXT, load_facts
from ..methods import toolkit_statistics
from ..metrics import wait
from ..protocol import peak_megabytes

# Neither stop test fires: every request takes all its steps.
ALL_STEPS = {"v_loss_threshold": 0.0, "v_nll_threshold": 0.0}

# Tokens of the rows of WikiText-2's validation part that are not empty, at 25 evenly spaced quantiles.
ROW_LENGTHS = (
    6, 7, 7, 8, 10, 11, 14, 18, 32, 50, 67, 82, 96, 109, 122, 135, 148, 159, 172, 189, 209, 229, 250, 279, 351,
)  # fmt: skip

Job = Callable[..., dict[str, Any]]


def _requests(count: int, first: int = 0) -> list[dict[str, Any]]:
    """`count` of the shipped facts, from the `first` on, in an order that mixes relations."""
    facts = load_facts()
    step = 7  # no divisor of their number
    return [facts[(first + i) * step % len(facts)].request() for i in range(count)]


def _session(model_name: str, **changes: Any) -> EditSession:
    """A session that is ready to edit: statistics read, contexts sampled."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hparams = dataclasses.replace(CoachHooKHparams.from_hparams(model_name), **changes)
    model = AutoModelForCausalLM.from_pretrained(hparams.model_name).float()
    session = EditSession(
        model.to(hparams.torch_device()), AutoTokenizer.from_pretrained(hparams.model_name), hparams, progress=False
    )
    _ = session.state, session.prefixes
    return session


def edits(model_name: str, count: int, steps: int | None = None) -> dict[str, Any]:
    """Seconds for one batch by CoachHooK, with the default settings or exactly `steps` of the paper's size."""
    changes = {} if steps is None else {"v_num_grad_steps": steps, "v_lr": 0.5, **ALL_STEPS}
    session = _session(model_name, **changes)
    start = session.state
    session.edit(_requests(1, first=count))  # threads, kernels and allocator warm up
    session.restore(start)
    result = session.edit(_requests(count))
    peak = peak_megabytes(next(session.model.parameters()).device)
    return {"seconds": result.seconds, "steps": result.steps, "peak_megabytes": peak}


def memit(model_name: str, count: int, steps: int) -> dict[str, Any]:
    """Seconds for one batch by the toolkit's MEMIT, statistics laid ready and contexts sampled beforehand."""
    from ..methods import build

    with tempfile.TemporaryDirectory() as folder:
        method: Any = build("memit", model_name, Path(folder))
        method.hparams.v_num_grad_steps = steps
        method.edit_requests(_requests(1, first=count))
        started = time.perf_counter()
        method.edit_requests(_requests(count))
        return {
            "seconds": time.perf_counter() - started,
            "peak_megabytes": peak_megabytes(next(method.model.parameters()).device),
        }


def consecutive(model_name: str, batches: int, size: int, turns: int) -> dict[str, Any]:
    """Seconds of every batch, all of the same requests and with all steps, so that each does the same work.

    Beside each of the last `turns` batches the first one is timed once more, as the machine's own speed changes in the
    minutes between the two.
    """
    session = _session(model_name, v_num_grad_steps=4, **ALL_STEPS)
    start = session.state
    session.edit(_requests(size))
    session.restore(start)
    seconds, first = [], []
    for batch in range(batches):
        if batch >= batches - turns:
            here = session.state
            session.restore(start)
            first.append(session.edit(_requests(size)).seconds)
            session.restore(here)
        seconds.append(session.edit(_requests(size)).seconds)
    return {"seconds": seconds, "first_in_turn": first}


def key_statistics(model_name: str, tokens: int, even: bool = False) -> dict[str, Any]:
    """Seconds for the key statistics of all edited layers over equal tokens, ours and the toolkit's.

    Args:
        even: give the toolkit documents of equal length, the best case for a pass that pads them, instead of documents
            as long as the rows of WikiText-2.
    """
    session = _session(model_name)
    hparams, model, tokenizer = session.hparams, session.model, session.tokenizer
    parts = model_parts(model, hparams)
    size = key_size(parts)
    source = text_source(
        model, tokenizer, dataclasses.replace(hparams, mom2_key_multiple=tokens / size), size, session.device
    )
    rows = torch.cat([source.batch(i) for i in range(source.batches)])
    documents = list(rows) if even else _cut(rows.flatten(), ROW_LENGTHS)
    with frozen(model):
        started = time.perf_counter()
        found = collected_sums(model, parts.projections, source, progress=False)
        ours = time.perf_counter() - started
        texts = [tokenizer.decode(document) for document in documents]
        theirs, count = toolkit_statistics(model, tokenizer, parts, hparams, texts)
    return {"ours": ours, "toolkit": theirs, "tokens": next(iter(found.values())).count, "toolkit_tokens": count}


def _cut(ids: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Token ids (T,) as documents of these lengths, over and over, in a random order."""
    order = random.Random(0)
    drawn: list[int] = []
    while sum(drawn) < len(ids):
        drawn += order.sample(lengths, len(lengths))
    ends = [end for end in itertools.accumulate(drawn) if end < len(ids)]
    return list(torch.tensor_split(ids, ends))


def inference(model_name: str, repeats: int) -> dict[str, Any]:
    """Seconds of a forward pass over 8 x 256 tokens and of a cached decoding step, with and without hook layers."""
    session = _session(model_name)
    session.edit(_requests(10))
    model: Any = session.model
    ids = torch.tensor(session.tokenizer(HELD_TEXT.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    rows = ids.repeat(-(-8 * 256 // len(ids)))[: 8 * 256].view(8, 256).to(session.device)

    @torch.no_grad()
    def forward() -> float:
        started = time.perf_counter()
        model(input_ids=rows, use_cache=False)
        wait(session.device)
        return time.perf_counter() - started

    @torch.no_grad()
    def decode(steps: int = 32) -> float:
        past = model(input_ids=rows[:1, :64], use_cache=True).past_key_values
        wait(session.device)
        started = time.perf_counter()
        for at in range(steps):
            past = model(input_ids=rows[:1, 64 + at : 65 + at], past_key_values=past, use_cache=True).past_key_values
        wait(session.device)
        return (time.perf_counter() - started) / steps

    found: dict[str, list[float]] = {name: [] for name in ("forward", "forward_base", "decode", "decode_base")}
    for measure in (forward, decode):
        measure()
        for _ in range(repeats):
            found[measure.__name__].append(measure())
            with session.disabled():
                found[f"{measure.__name__}_base"].append(measure())
    kept = session.kept_bytes() / 2**20
    return {**found, "kept_megabytes": kept}


def arithmetic(model_name: str, count: int) -> dict[str, Any]:
    """Operations that one batch takes, and the rate at which this machine multiplies matrices of a like shape."""
    session = _session(model_name)
    counter = FlopCounterMode(display=False)
    with counter:
        seconds = session.edit(_requests(count)).seconds
    d, m = session.state.layers[session.hparams.layers[0]].delta.shape
    one, other = torch.randn(512, d, device=session.device), torch.randn(d, m, device=session.device)
    rates = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(20):
            one @ other
        wait(session.device)
        rates.append(20 * 2 * 512 * d * m / (time.perf_counter() - started))
    gc.collect()
    return {"operations": counter.get_total_flops(), "rate": statistics.median(rates), "seconds_counted": seconds}


JOBS: dict[str, Job] = {
    job.__name__: job for job in (edits, memit, consecutive, key_statistics, inference, arithmetic)
}
