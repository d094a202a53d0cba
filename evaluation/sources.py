"""Where a run's records come from: the shipped facts, a local file, or a data set on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import FACTS, Record, Records, answerable, read_raw, records_of

FACTS_NAME = "facts"


@dataclass(frozen=True)
class Dataset:
    """What a run edits, and what it may use besides."""

    name: str
    records: list[Record]  # to be edited
    spare: list[Record]  # of the same file, neither edited nor scored
    checksum: str  # SHA-256 of the file
    skipped: dict[str, int]


def load_dataset(
    name: str,
    edits: int,
    path: str | None = None,
    file: str | None = None,
    split: str | None = None,
    shape: str | None = None,
    order: str = "first",
    skip: int = 0,
) -> Dataset:
    """The first `edits` records, or `edits` of them evenly spread over the file (`order: spread`).

    Args:
        path: a local file, or a data set's name on the hub; the shipped facts where not given and the name is "facts".
        file: which file of that data set; its rows are read through `datasets` where not given.
        split: which part of that data set.
        shape: as in `data.SHAPES`; recognised where not given.
        skip: how many records to leave out before the first.

    Raises:
        ValueError: there are fewer records, or none of that kind.
    """
    if order not in ("first", "spread"):
        raise ValueError(f"dataset.order is {order!r}; choose first or spread")
    if edits < 1:
        raise ValueError(f"edits is {edits}; it must be at least 1")
    if skip < 0:
        raise ValueError(f"dataset.skip is {skip}; give a number of records, from 0 on")
    if path is None and name != FACTS_NAME:
        raise ValueError(
            f"dataset.path is not set: the records of {name} do not come with this project; give a file, or a data "
            "set's name on the Hugging Face hub"
        )
    raw, checksum = _read(str(FACTS) if path is None else path, file, split)
    found = records_of(raw, path or FACTS_NAME, None, shape)
    count = len(found) - skip
    if count < edits:
        left = f", {sum(found.skipped.values())} more cannot be edited" if found.skipped else ""
        after = f" after the {skip} that dataset.skip leaves out" if skip else ""
        raise ValueError(
            f"edits is {edits}, but {path or FACTS_NAME} has {max(0, count)} records{after}{left}; ask for fewer"
        )
    chosen = [skip + i for i in (spread(count, edits) if order == "spread" else range(edits))]
    return Dataset(
        name=name,
        records=answerable([found[i] for i in chosen]),
        spare=_spare(found, set(chosen)),
        checksum=checksum,
        skipped=dict(found.skipped),
    )


def spread(count: int, edits: int) -> list[int]:
    """`edits` places in a list of `count`, evenly apart."""
    return [i * count // edits for i in range(edits)]


def _spare(found: Records, chosen: set[int]) -> list[Record]:
    """Records that are not edited, and share no neighbour with those that are."""
    scored = {probe.prompt for i in chosen for probe in found[i].locality}
    rest = (record for i, record in enumerate(found) if i not in chosen)
    return [record for record in rest if not any(probe.prompt in scored for probe in record.locality)]


def _read(path: str, file: str | None, split: str | None) -> tuple[list[Any], str]:
    """The raw records and the checksum of what was read."""
    local = Path(path).expanduser()
    if local.exists() or "/" not in path or local.suffix in (".json", ".jsonl"):
        content = local.read_bytes()
        return read_raw(local), hashlib.sha256(content).hexdigest()
    if file is not None:
        from huggingface_hub import hf_hub_download

        fetched = Path(hf_hub_download(path, file, repo_type="dataset"))
        return read_raw(fetched), hashlib.sha256(fetched.read_bytes()).hexdigest()
    import datasets

    rows = [dict(row) for row in datasets.load_dataset(path, split=split or "train")]
    text = json.dumps(rows, sort_keys=True, ensure_ascii=False, default=str)
    return rows, hashlib.sha256(text.encode()).hexdigest()
