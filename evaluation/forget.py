"""What is left of facts that were forgotten, and what that does to the others.

    python -m evaluation.forget --data counterfact.json [--edits 100] [--forget 20]

Edits the first records in consecutive batches of 10, saves the session, and forgets some of them, drawn at random.
Answers are compared as teacher-forced tokens at the target and as free continuations, with those before the first edit
(the forgotten facts) and with those before the forgetting (the others); the scores are the protocol's. The size of the
saved folder is compared with what float32 factors and dense changes would take.

Writes `forget.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from coachhook_plugin import CoachHooKHparams, EditSession

from .data import Record, load_records
from .metrics import agreement, continuations, perplexity
from .protocol import Reading, mean_scores, read, score

MODEL, BATCH = "smollm2-135m", 10

Answered = tuple[list[Reading], list[list[int]], "float | None"]  # at all probes, in free text, perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="file of editing records")
    parser.add_argument("--text", type=Path, help="held text, for the perplexity")
    parser.add_argument("--edits", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--forget", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default: %(default)s")
    parser.add_argument("--model", default=MODEL, help="hyperparameters by path or shipped name; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/forget"))
    options = parser.parse_args()
    held = options.text.read_text(encoding="utf-8") if options.text else None
    options.out.mkdir(parents=True, exist_ok=True)
    figures = run(
        options.model, options.data, options.edits, options.forget, options.seed, held, options.out / "edits"
    )
    text = json.dumps(figures, indent=2) + "\n"
    (options.out / "forget.json").write_text(text, encoding="utf-8")
    print(text, end="")


def run(
    model_name: str, data: Path, edits: int, forget: int, seed: int, held: str | None, folder: Path
) -> dict[str, Any]:
    """Edit, save, forget, and measure."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hparams = CoachHooKHparams.from_hparams(model_name)
    model = AutoModelForCausalLM.from_pretrained(hparams.model_name).float().to(hparams.torch_device())
    tokenizer = AutoTokenizer.from_pretrained(hparams.model_name)
    records = list(load_records(data, edits))
    session = EditSession(model, tokenizer, hparams)
    _ = session.state

    def answered(what: str) -> Answered:
        prompts = [record.prompt for record in records]
        fluency = None if held is None else perplexity(model, tokenizer, held)
        return read(model, tokenizer, records, what), continuations(model, tokenizer, prompts), fluency

    before = answered("before")
    ids: list[str] = []
    for start in tqdm(range(0, len(records), BATCH), desc="edits", unit="batch"):
        ids += session.edit([record.request() for record in records[start : start + BATCH]]).ids
    edited = answered("edited")
    session.save(folder)
    gone = sorted(random.Random(seed).sample(range(len(records)), forget))
    started = time.perf_counter()
    session.forget([ids[i] for i in gone])
    seconds = time.perf_counter() - started
    after = answered("after")
    others = [i for i in range(len(records)) if i not in gone]
    return {
        "data": data.name,
        "edits": len(records),
        "forgotten": {"count": len(gone), **compared(records, gone, before, edited, after, before)},
        "others": {"count": len(others), **compared(records, others, before, edited, after, edited)},
        "perplexity": {"before": before[2], "edited": edited[2], "after": after[2]},
        "seconds_to_forget": round(seconds, 1),
        "in_scope_before_forgetting": sum(edit.in_scope for edit in session.ledger),
        "disk": disk(session, folder),
    }


def compared(
    records: list[Record],
    which: list[int],
    before: Answered,
    edited: Answered,
    after: Answered,
    asked: Answered,
) -> dict[str, Any]:
    """Scores at each time, and how much of `after` is as in `asked`, for some of the records."""

    def scores(at: Answered) -> dict[str, float]:
        found = mean_scores([score(before[0][i], at[0][i]) for i in which])
        return {name: round(value, 4) for name, value in found.items() if value == value}

    tokens = [agreement(asked[0][i].prompt[0].said, after[0][i].prompt[0].said) for i in which]
    changed = [
        {"prompt": records[i].prompt, "subject": records[i].subject, "target_new": records[i].target_new}
        for i, share in zip(which, tokens, strict=True)
        if share < 1
    ]
    return {
        "before": scores(before),
        "edited": scores(edited),
        "after": scores(after),
        "same_answer": sum(share == 1 for share in tokens),
        "same_continuation": sum(asked[1][i] == after[1][i] for i in which),
        "other_answer": changed,
    }


def disk(session: EditSession, folder: Path) -> dict[str, Any]:
    """Bytes of the folder without the memory, and of the plain alternatives."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    shapes = [layer.delta.shape for layer in session.state.layers.values()]
    low_rank = sum(4 * (d + m) * len(session.ledger) for d, m in shapes)
    dense = sum(4 * d * m for d, m in shapes)
    kept = sum(size for name, size in sizes.items() if not name.startswith("memory"))
    return {
        "files": sizes,
        "without_memory": kept,
        "low_rank_float32": low_rank,
        "dense_float32": dense,
        "ratio": round(kept / min(low_rank, dense), 4),
    }


if __name__ == "__main__":
    main()
