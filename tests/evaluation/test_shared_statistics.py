"""Every method is given the C0 that was asked for, whoever else computes on the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import zoo

from evaluation.methods.statistics import share_statistics


def test_statistics_of_another_text_do_not_take_the_place_of_those_that_a_run_reads(
    tmp_path: Path, tiny: Callable[..., Any], tokenizer: Any
) -> None:
    """Two jobs of one model side by side, with different `model.statistics`."""
    found = []
    for name, text in (("one", zoo.TEXT), ("other", zoo.TEXT[::-1]), ("again", zoo.TEXT)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        theirs = SimpleNamespace(
            layers=[1, 2], stats_dir=str(tmp_path / "shared"), mom2_dataset="wikipedia", mom2_n_samples=10,
            mom2_dtype="float32",
        )  # fmt: skip
        model = tiny("llama").eval()
        model.config._name_or_path = "tiny"  # the toolkit's folders are named after it
        share_statistics(model, tokenizer, zoo.hparams(tmp_path / name, layers=[1, 2]), theirs)
        files = sorted(Path(theirs.stats_dir).rglob("*_mom2_10.npz"))
        assert len(files) == 2
        found.append((theirs.stats_dir, np.load(files[0])["mom2.mom2"]))
    (one, kept), (other, changed), (again, same) = found
    assert one == again != other
    assert np.array_equal(kept, same)
    assert not np.allclose(kept, changed)
