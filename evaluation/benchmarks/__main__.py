"""Benchmarks of the engine beside the toolkit's own MEMIT and statistics.

    python -m evaluation.benchmarks [--parts edits,sizes,statistics,inference,batches,memory]

Every figure is a ratio of two things measured in this run, each in a process of its own, one at a time; where they are
repeated they take turns, and the ratio is that of the medians. Writes `summary.json` (the ratios, with the raw runs
beside them) and `benchmarks.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from ..machine import processor
from .jobs import JOBS

PARTS = ("edits", "sizes", "statistics", "inference", "batches", "memory")
STEPS = 25  # at equal steps: the paper's number
SIZES = (1, 10, 50, 100)
TURNS = 10  # of late batches and the first one


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma separated; default: %(default)s")
    parser.add_argument("--model", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=2, help="of what is compared with the toolkit; default: 2")
    parser.add_argument(
        "--text", type=Path, help="file whose lines are the documents of one more run of the statistics"
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--worker", nargs=2, metavar=("JOB", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--arguments", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        job, out = options.worker
        told = JOBS[job](options.model, **json.loads(options.arguments))
        Path(out).write_text(json.dumps(told), encoding="utf-8")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "summary.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    figures["machine"] = {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    bench = Bench(options.model, Console())
    for part in options.parts.split(","):
        figures |= getattr(bench, part)(*([options.repeats] if part in ("edits", "statistics") else []))
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    from .report import draw, show

    show(figures, bench.console)
    draw(figures, options.out / "benchmarks.png")


class Bench:
    """The parts of the benchmark; each returns ratios by name, and its raw runs."""

    def __init__(self, model: str, console: Console) -> None:
        self.model, self.console = model, console

    def edits(self, repeats: int) -> dict[str, Any]:
        """Seconds per edit in a batch of 10 beside the toolkit's MEMIT, and the operations it takes."""
        runs: dict[str, list[dict[str, Any]]] = {"toolkit_memit": [], "ours_equal_steps": [], "ours_default": []}
        for _ in range(repeats):
            runs["toolkit_memit"].append(self.job("memit", count=10, steps=STEPS))
            runs["ours_equal_steps"].append(self.job("edits", count=10, steps=STEPS))
            runs["ours_default"].append(self.job("edits", count=10))
        theirs, equal, default = (median([run["seconds"] for run in found]) for found in runs.values())
        operations = self.job("arithmetic", count=10)
        return {
            "edit_speedup_equal_steps": theirs / equal,
            "edit_speedup_vs_toolkit_memit": theirs / default,
            "seconds_per_edit": {"toolkit_memit": theirs / 10, "equal_steps": equal / 10, "default": default / 10},
            # The least time in which this machine could do the operations, over the time it took.
            "share_of_arithmetic_limit": operations["operations"] / operations["rate"] / default,
            "raw_edits": {**runs, "arithmetic": operations},
        }

    def sizes(self) -> dict[str, Any]:
        """Edits per second by batch size."""
        runs = {size: self.job("edits", count=size) for size in SIZES}
        return {"edits_per_second": {size: size / run["seconds"] for size, run in runs.items()}, "raw_sizes": runs}

    def statistics(self, repeats: int) -> dict[str, Any]:
        """Key statistics of all edited layers beside the toolkit's, which pads its documents.

        These are as long as the rows of WikiText-2; and, the best case for it, of equal length.
        """
        found: dict[str, Any] = {"raw_statistics": {}}
        for name, even in (("statistics_speedup_vs_toolkit", False), ("statistics_speedup_without_padding", True)):
            runs = [self.job("key_statistics", tokens=15360, even=even) for _ in range(repeats)]
            found[name] = median([run["toolkit"] for run in runs]) / median([run["ours"] for run in runs])
            found["raw_statistics"][name] = runs
        return found

    def inference(self) -> dict[str, Any]:
        """What the hook layers cost a forward pass and a cached decoding step."""
        run = self.job("inference", repeats=21)
        return {
            "forward_overhead": median(run["forward"]) / median(run["forward_base"]),
            "decode_overhead": median(run["decode"]) / median(run["decode_base"]),
            "raw_inference": run,
        }

    def batches(self) -> dict[str, Any]:
        """The last of 50 consecutive batches beside the first."""
        run = self.job("consecutive", batches=50, size=10, turns=TURNS)
        last, first = median(run["seconds"][-TURNS:]), median(run["first_in_turn"])
        return {"batch50_over_batch1": last / first, "raw_batches": run}

    def memory(self) -> dict[str, Any]:
        """Peak memory of 100 edits at once beside that of 10."""
        runs = {count: self.job("edits", count=count, steps=2) for count in (10, 100)}
        peaks = {count: run["peak_megabytes"] for count, run in runs.items()}
        return {"peak_memory_100_over_10": peaks[100] / peaks[10], "raw_memory": runs}

    def job(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Run one job in a process of its own."""
        self.console.print(f"{name} {arguments}")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "told.json"
            command = [
                sys.executable,
                "-m",
                "evaluation.benchmarks",
                "--model",
                self.model,
                "--worker",
                name,
                str(out),
            ]
            subprocess.run([*command, "--arguments", json.dumps(arguments)], check=True, env=os.environ)
            told: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return told


if __name__ == "__main__":
    main()
