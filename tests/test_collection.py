"""Sums over pre-training keys: shared by several processes they are those of one, and they tell how exact they are."""

from __future__ import annotations

import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import zoo
from torch import distributed

from coachhook_plugin.architectures import model_parts
from coachhook_plugin.collection import KeySums, collected_sums
from coachhook_plugin.statistics import KeyStatistics, key_statistics, load_statistics, save_statistics
from coachhook_plugin.text import text_source
from coachhook_plugin.trace import frozen

CPU = torch.device("cpu")
# What this process has imported, the others need not import again; elsewhere than on Linux a copy may crash.
BEGIN = "fork" if sys.platform == "linux" else "spawn"
TOKENS = 9000  # five batches of the tiny models' text: two processes have unequal shares


def long_text(folder: Path) -> Path:
    path = folder / "long.txt"
    facts = [f"{i}: {fact['prompt']} {fact['target_new']}." for i in range(600) for fact in zoo.FACTS]
    path.write_text("\n\n".join(facts), encoding="utf-8")
    return path


def found(text: Path, cache: Path) -> dict[int, KeyStatistics]:
    os.environ["COACHHOOK_CACHE"] = str(cache)
    tokenizer = zoo.tokenizer()
    model = zoo.model("llama", len(tokenizer)).eval()
    hparams = zoo.hparams(text, mom2_key_multiple=TOKENS / 48)
    with frozen(model):
        parts = model_parts(model, hparams)
        return key_statistics(
            model, parts, hparams, lambda: text_source(model, tokenizer, hparams, 48, CPU), progress=False
        )


def in_a_process(rank: int, folder: str, caches: list[str]) -> None:
    torch.set_num_threads(1)  # a copied process has no other
    place = Path(folder)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{place / '-'.join(['meeting', *caches])}",
        rank=rank,
        world_size=len(caches),
        timeout=timedelta(seconds=60),
    )
    try:
        of_layers = found(place / "long.txt", place / caches[rank])
    finally:
        distributed.destroy_process_group()
    torch.save({i: (s.total, s.count, s.fourth) for i, s in of_layers.items()}, place / f"{rank}.pt")


@pytest.mark.once
@pytest.mark.slow
def test_processes_that_share_the_text_all_get_what_one_process_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", "")
    alone = found(long_text(tmp_path), tmp_path / "alone")
    mp.start_processes(in_a_process, args=(str(tmp_path), ["shared", "shared"]), nprocs=2, start_method=BEGIN)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    kept = [load_statistics(path, 48) for path in sorted((tmp_path / "shared" / "statistics").iterdir())]
    assert len(kept) == len(alone) == 2
    for layer, expected in alone.items():
        total, count, fourth = first[layer]
        assert torch.equal(total, second[layer][0])
        assert any(torch.equal(total, file.total) for file in kept)
        assert count == second[layer][1] == expected.count
        assert fourth == pytest.approx(expected.fourth, rel=1e-9)
        torch.testing.assert_close(total, expected.total, rtol=1e-6, atol=1e-6)


@pytest.mark.once
@pytest.mark.slow
def test_a_process_that_has_the_statistics_already_helps_one_that_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines, of which the first one keeps what was collected."""
    monkeypatch.setenv("COACHHOOK_CACHE", "")
    alone = found(long_text(tmp_path), tmp_path / "first")
    mp.start_processes(in_a_process, args=(str(tmp_path), ["first", "second"]), nprocs=2, start_method=BEGIN)
    for rank in range(2):
        for layer, (total, count, _) in torch.load(tmp_path / f"{rank}.pt").items():
            assert count == alone[layer].count
            torch.testing.assert_close(total, alone[layer].total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stated_error_of_the_covariance_is_the_one_seen_over_many_samples(dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    m, n, scales = 12, 50, np.logspace(0, -1, 12)
    truth = np.diag(scales**2)
    errors, told = [], []
    for _ in range(400):
        sums = KeySums(m, CPU)
        for _ in range(5):
            sums.add(torch.tensor(random.normal(size=(2, n // 10, m)) * scales).to(dtype))
        statistics = KeyStatistics(sums.total, sums.count, sums.fourth)
        assert statistics.count == n
        errors.append(np.linalg.norm(statistics.covariance().numpy() - truth) / np.linalg.norm(truth))
        told.append(statistics.standard_error())
    # A sample's own C0 is a little larger than the truth, by the very error told.
    assert np.mean(told) == pytest.approx(math.sqrt(np.mean(np.square(errors))), rel=0.15)
    assert statistics.standard_error(4 * n) == pytest.approx(told[-1] / 2)


def test_the_estimate_is_kept_with_the_statistics_and_missing_from_the_toolkits(tmp_path: Path) -> None:
    sums = KeySums(4, CPU)
    sums.add(torch.randn(100, 4, generator=torch.Generator().manual_seed(0)))
    statistics = KeyStatistics(sums.total, sums.count, sums.fourth)
    save_statistics(tmp_path / "ours.npz", statistics)
    loaded = load_statistics(tmp_path / "ours.npz", 4)
    assert loaded.fourth == statistics.fourth
    assert loaded.standard_error() == pytest.approx(statistics.standard_error(), rel=1e-6)
    assert "100 keys, 25.0 for each of their 4 entries; C0 is known to" in loaded.told()
    plain = KeyStatistics(sums.total, sums.count)
    save_statistics(tmp_path / "theirs.npz", plain)
    loaded = load_statistics(tmp_path / "theirs.npz", 4)
    assert loaded.standard_error() is None
    assert "is known to" not in loaded.told()


def test_what_other_threads_run_meanwhile_is_not_collected(tmp_path: Path) -> None:
    tokenizer, hparams = zoo.tokenizer(), zoo.hparams(long_text(tmp_path), mom2_key_multiple=30)
    model = zoo.model("llama", len(tokenizer))
    parts, ids = model_parts(model, hparams), torch.arange(20)[None]

    def sums() -> torch.Tensor:
        source = text_source(model, tokenizer, hparams, 48, CPU)
        return collected_sums(model, parts.projections, source, progress=False)[1].total

    alone, heard = sums(), []

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                heard.append(pool.submit(lambda: model(input_ids=ids).logits.shape).result(timeout=60))

    model.model.layers[0].register_forward_hook(meanwhile)
    assert torch.equal(sums(), alone)
    assert heard[0] == (1, 20, len(tokenizer))
