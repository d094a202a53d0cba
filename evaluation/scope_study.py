"""The editing scopes side by side: who is let in, and what that does to the scores.

    python -m evaluation.scope_study --data counterfact.json zsre.json --text held.txt [--edits 200] [--batch-size 10]

The first `--edits` records of every file are edited in consecutive batches, once with each scope (and once more with
the residual spread over the first and the last layer alone), otherwise with the same settings; everything is scored
before the first batch and after the last. On the way, after 1, 5, 10, 50, 100 and all batches, the margin (score over
what is asked; from 1 on a token is answered) is taken at the last token of every edited subject and of every rephrased
one, at all tokens of the neighbourhood prompts, and at all tokens of the held text. Each run is a process of its own
and is kept; a run that is already there is not made again.

Writes `summary.json` (by data set and scope), the runs, and `scope.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from coachhook_plugin import CoachHooKHparams, EditSession, Request
from coachhook_plugin.tokens import Encoder, occurrences

from .data import Record, load_records
from .metrics import continuations, perplexity, starts_with
from .protocol import mean_scores, read, score
from .scope_report import GROUPS

MODEL = "smollm2-135m"
SCOPES: dict[str, dict[str, Any]] = {
    "zscore": {"scope": "zscore"},
    "leverage": {"scope": "leverage"},
    "leverage-boundary": {"scope": "leverage", "spread": "boundary"},
}
STEPS = (1, 5, 10, 50, 100)  # batches
TEXT_TOKENS, WINDOW = 4096, 256
COLUMNS = (
    "reliability",
    "generality",
    "locality",
    "perplexity_ratio",
    "open_rate_text",
    "starts_with_answer",
    "cached_as_uncached",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of editing records")
    parser.add_argument("--text", type=Path, required=True, help="held text, for perplexity and opening rates")
    parser.add_argument("--edits", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--model", default=MODEL, help="hyperparameters by path or shipped name; default: %(default)s")
    parser.add_argument("--scopes", default=",".join(SCOPES), help="comma separated; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/scope"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        found = run(options.model, options.worker, options.data[0], options.text, options.edits, options.batch_size)
        kept(options.out, options.data[0], options.worker).write_text(json.dumps(found) + "\n", encoding="utf-8")
        return
    for path in options.data:
        for scope in options.scopes.split(","):
            if not _is_there(kept(options.out, path, scope), options.edits, options.batch_size):
                command = [sys.executable, "-m", "evaluation.scope_study", *sys.argv[1:], "--worker", scope]
                subprocess.run([*command, "--data", str(path)], check=True, env=os.environ)
    runs = [
        json.loads(kept(options.out, path, scope).read_text(encoding="utf-8"))
        for path in options.data
        for scope in options.scopes.split(",")
    ]
    figures = summary(runs)
    (options.out / "summary.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    from .scope_report import draw

    draw(runs, options.out / "scope.png")
    show(figures, Console(width=None if sys.stdout.isatty() else 150))


def kept(out: Path, data: Path, scope: str) -> Path:
    """Where a run is kept."""
    return out / f"{data.stem}-{scope}.json"


def _is_there(path: Path, edits: int, batch_size: int) -> bool:
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return (found["asked"], found["batch_size"]) == (edits, batch_size)


def run(model_name: str, scope: str, data: Path, text: Path, edits: int, batch_size: int = 10) -> dict[str, Any]:
    """Edit one data set with one scope, and measure."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hparams = dataclasses.replace(CoachHooKHparams.from_hparams(model_name), **SCOPES[scope])
    model = AutoModelForCausalLM.from_pretrained(hparams.model_name).float().to(hparams.torch_device())
    tokenizer = AutoTokenizer.from_pretrained(hparams.model_name)
    records = load_records(data, edits)
    held = text.read_text(encoding="utf-8")
    session = EditSession(model, tokenizer, hparams)
    _ = session.state

    before = read(model, tokenizer, records, "scores before")
    perplexity_before = perplexity(model, tokenizer, held)
    margins: dict[int, dict[str, list[float]]] = {}
    refused = []
    starts = range(0, len(records), batch_size)
    for number, start in enumerate(tqdm(starts, desc=f"{data.stem}, {scope}", unit="batch"), start=1):
        batch = records[start : start + batch_size]
        try:
            session.edit([record.request() for record in batch])
        except ValueError as error:
            refused.append(str(error))
        done = start + len(batch)
        if number in STEPS or done == len(records):
            margins[done] = margins_of(session, tokenizer, records[:done], held)

    after = read(model, tokenizer, records, "scores after")
    prompts = [record.prompt for record in records]
    said, alone = (continuations(model, tokenizer, prompts, use_cache=cached) for cached in (True, False))
    answered = [
        starts_with(str(tokenizer.decode(row, skip_special_tokens=True)), record.target_new)
        for row, record in zip(said, records, strict=True)
    ]
    scores = mean_scores([score(b, a) for b, a in zip(before, after, strict=True)])
    text_margins = margins[len(records)]["text"]
    return {
        "dataset": data.stem,
        "scope": scope,
        "asked": edits,
        "batch_size": batch_size,
        "edits": len(session),
        "refused": refused,
        **{name: value for name, value in scores.items() if not math.isnan(value)},
        "perplexity_ratio": perplexity(model, tokenizer, held) / perplexity_before,
        "open_rate_text": sum(margin >= 1 for margin in text_margins) / len(text_margins),
        "starts_with_answer": sum(answered) / len(answered),
        "cached_as_uncached": sum(a == b for a, b in zip(said, alone, strict=True)) / len(said),
        "margins": {
            done: {group: [round(m, 4) for m in found[group]] for group in GROUPS} for done, found in margins.items()
        },
        "settings": {name: value for name, value in hparams.to_dict().items() if name != "model_name"},
    }


def margins_of(session: EditSession, tokenizer: Any, records: Sequence[Record], held: str) -> dict[str, list[float]]:
    """Margins by group, see the head of this file."""
    found: dict[str, list[float]] = {group: [] for group in GROUPS}
    for record in records:
        found["edited"] += _at_subject(session, tokenizer, f"{record.prompt} {record.target_new}", record.subject)
        for rephrase in record.rephrases:
            found["rephrased"] += _at_subject(session, tokenizer, rephrase, record.subject)
        for probe in record.locality:
            ids = torch.tensor(tokenizer(probe.prompt)["input_ids"])
            found["neighbours"] += session.margins(ids).tolist()
    ids = torch.tensor(tokenizer(held, verbose=False)["input_ids"][:TEXT_TOKENS])
    for part in torch.split(ids, WINDOW):
        found["text"] += session.margins(part).tolist()
    return {group: [max(margin, -9.0) for margin in margins] for group, margins in found.items()}


def _at_subject(session: EditSession, tokenizer: Any, text: str, subject: str) -> list[float]:
    """The margin at the subject's last token, where the text names the subject once."""
    if occurrences(text, subject) != 1:
        return []
    row = Encoder(tokenizer, None).prompt("", Request(text, subject, ""))
    return [float(session.margins(torch.tensor(row.ids))[row.subject])]


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures by data set and scope, with opening rates by group and number of edits."""
    figures: dict[str, Any] = {}
    for one in runs:
        opened = {
            done: {group: sum(m >= 1 for m in found[group]) / max(1, len(found[group])) for group in GROUPS}
            for done, found in one["margins"].items()
        }
        told = {name: one[name] for name in ("edits", "batch_size", *COLUMNS)}
        figures.setdefault(one["dataset"], {})[one["scope"]] = {**told, "open_rates": opened}
    return figures


def show(figures: dict[str, Any], console: Console) -> None:
    """The summary as a table."""
    table = Table(title="Editing scopes, after the last batch")
    for name in ("data set", "scope", "edits", *COLUMNS):
        table.add_column(name.replace("_", " "), justify="left" if name in ("data set", "scope") else "right")
    for dataset, scopes in figures.items():
        for scope, of in scopes.items():
            table.add_row(dataset, scope, str(of["edits"]), *(f"{of[name]:.3f}" for name in COLUMNS))
    console.print(table)


if __name__ == "__main__":
    main()
