"""The demo: 30 facts in 3 consecutive batches of 10 on the small real model, CoachHooK beside the toolkit's MEMIT.

    python -m evaluation.demo [--methods coachhook,memit] [--out results/demo]

Every method runs in a process of its own, so that no cache of one reaches the other and memory is its own. Writes
`summary.json`, `metrics.jsonl` (a line for each edit and method) and `demo.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from .data import HELD_TEXT, Record, load_facts
from .demo_report import draw, print_samples, print_table, summary, write_metrics
from .processes import worker_environment
from .protocol import Outcome, consecutive
from .sources import spread

MODEL = "smollm2-135m"
EDITS, BATCH = 30, 10
METHODS = ("coachhook", "memit")
CHANGES = {"memit": {"v_num_grad_steps": 18}}  # of 25: the demo shall end within 12 minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default="coachhook,memit", help="comma separated; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--edits", type=int, default=EDITS, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=BATCH, help="default: %(default)s")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.methods.split(",") if name.strip().lower() not in METHODS]
    if unknown:
        parser.error(f"--methods: {', '.join(unknown)} is not known here; choose from {', '.join(METHODS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        work(options.worker, options.out.resolve(), options.edits, options.batch_size)
        return
    started = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 150)
    outcomes = []
    for name in options.methods.split(","):
        console.print(f"[bold]{name.strip()}[/bold]: {options.edits} facts in batches of {options.batch_size}")
        command = [sys.executable, "-m", "evaluation.demo", "--worker", name.strip(), "--out", str(options.out)]
        command += ["--edits", str(options.edits), "--batch-size", str(options.batch_size)]
        subprocess.run(command, check=True, env=worker_environment())
        told = json.loads((options.out / f"{name.strip().lower()}.json").read_text(encoding="utf-8"))
        told.pop("perplexity_ratio")
        outcomes.append(Outcome(**told))
    print_samples(outcomes, console)
    print_table(outcomes, console)
    figures = summary(outcomes, MODEL, options.batch_size)
    (options.out / "summary.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    write_metrics(outcomes, options.out / "metrics.jsonl")
    draw(outcomes, options.out / "demo.png")
    console.print(f"Written to {options.out}: summary.json, metrics.jsonl, demo.png")
    console.print(f"{time.perf_counter() - started:.0f} s in all")


def work(name: str, out: Path, edits: int, batch_size: int) -> None:
    """Run one method in this process."""
    from .methods import build, settings

    records = choose(edits)
    os.chdir(out)  # the toolkit writes its logs into the working directory
    method = build(name, MODEL, out, settings(name, MODEL, CHANGES.get(name.lower())))
    outcome = consecutive(method, records, batch_size, HELD_TEXT.read_text(encoding="utf-8"))
    (out / f"{name.lower()}.json").write_text(json.dumps(outcome.to_dict(), indent=1) + "\n", encoding="utf-8")


def choose(edits: int) -> list[Record]:
    """Facts spread over all relations: every n-th of the shipped set."""
    facts = load_facts()
    if not 1 <= edits <= len(facts):
        raise ValueError(f"--edits is {edits}; the shipped set has {len(facts)} facts")
    return [facts[i] for i in spread(len(facts), edits)]


if __name__ == "__main__":
    main()
