"""MEMIT through this project's engine beside the toolkit's own: the same facts, contexts, statistics and settings.

    python -m evaluation.engine_equality --data counterfact.json --edits 20

What `method=memit-engine` says in a leaderboard stands for the toolkit's MEMIT as far as the two write the same
weights: the largest difference between them, over the size of the change, is printed and kept as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from .data import Record, load_records
from .methods import Peer, build, settings
from .methods.peers import TEMPLATES
from .protocol import mean_scores, read, score, seed_everything

ENGINE = Path(__file__).parent / "conf" / "method" / "memit-engine.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="file of editing records")
    parser.add_argument("--edits", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--model", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/engine_equality"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    theirs, ours = (settings("memit", options.model), engine_settings(options.model))
    records = load_records(options.data, options.edits)
    with tempfile.TemporaryDirectory() as folder:  # for what the toolkit writes
        found = compare(records, options.batch_size, theirs, ours, options.model, Path(folder))
    told = json.dumps({"data": options.data.name, **found}, indent=2)
    (options.out / "summary.json").write_text(told + "\n", encoding="utf-8")
    print(told)


def engine_settings(model: str) -> dict[str, Any]:
    """Those of `method=memit-engine`."""
    method = yaml.safe_load(ENGINE.read_text(encoding="utf-8"))
    return settings(method["name"], model, method["settings"])


def compare(
    records: Sequence[Record],
    batch_size: int,
    theirs: dict[str, Any],
    ours: dict[str, Any],
    statistics: str,
    folder: Path,
) -> dict[str, Any]:
    """Edit with both, batch after batch.

    Args:
        theirs, ours: hyperparameters of the toolkit's MEMIT and of our engine.
        statistics: hyperparameters that say where the shared key statistics come from.

    Returns:
        `relative_difference` by layer: ||their weight - our weight|| / ||their change||; scores of both.
    """
    seed_everything(0)
    peer = build(theirs["alg_name"], statistics, folder, theirs, statistics)
    assert isinstance(peer, Peer)
    peer.prepare()
    (memory,) = [place for place in peer.memory if place.endswith(TEMPLATES)]
    prefixes = [template.removesuffix("{}") for template in peer.state()["memory"][memory][1]]
    engine = build(ours["alg_name"], statistics, folder, {**ours, "context_prefixes": prefixes})
    engine.prepare()
    names = [f"{peer.hparams.rewrite_module_tmp.format(layer)}.weight" for layer in peer.hparams.layers]
    start = _weights(peer.model, names)
    scores = {}
    for name, method in (("toolkit", peer), ("engine", engine)):
        before = read(method.model, method.tokenizer, records)
        for first in range(0, len(records), batch_size):
            method.edit(records[first : first + batch_size])
        after = read(method.model, method.tokenizer, records)
        scores[name] = mean_scores([score(b, a) for b, a in zip(before, after, strict=True)])
    their, our = _weights(peer.model, names), _weights(engine.model, names)
    return {
        "edits": len(records),
        "batch_size": batch_size,
        "relative_difference": {
            name: float((t - o).norm() / (t - s).norm())
            for name, s, t, o in zip(names, start, their, our, strict=True)
        },
        "scores": {
            name: {metric: value for metric, value in of.items() if value == value} for name, of in scores.items()
        },
    }


def _weights(model: nn.Module, names: Sequence[str]) -> list[torch.Tensor]:
    return [model.get_parameter(name).detach().double().clone() for name in names]


if __name__ == "__main__":
    main()
