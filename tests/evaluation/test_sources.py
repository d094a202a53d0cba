"""Where records come from is told apart, and named by a checksum."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation.data import FACTS, SHAPES, load_records
from evaluation.sources import load_dataset

RECORDS = [
    {
        "subject": f"Lake {name}",
        "src": f"Which river feeds Lake {name}?",
        "rephrase": f"What river runs into Lake {name}?",
        "alt": "Great Ostrel",
        "answers": ["Anser"],
        "loc": f"nq question: who sang number {i // 2}",
        "loc_ans": "Mara Veld",
    }
    for i, name in enumerate(["Quill", "Brent", "Oslar", "Vane", "Mirren", "Tor"])
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    return path


def test_the_checksum_is_that_of_the_file(file: Path) -> None:
    found = load_dataset("zsre", 2, str(file), shape="zsre")
    assert found.checksum == hashlib.sha256(file.read_bytes()).hexdigest()
    assert [record.subject for record in found.records] == ["Lake Quill", "Lake Brent"]
    assert load_dataset("facts", 3, order="spread").checksum == hashlib.sha256(FACTS.read_bytes()).hexdigest()


def test_spare_records_share_no_neighbour_with_scored_ones(file: Path) -> None:
    """A method that learns from them must not learn what it is scored on."""
    found = load_dataset("zsre", 3, str(file))
    scored = {probe.prompt for record in found.records for probe in record.locality}
    assert [record.subject for record in found.spare] == ["Lake Mirren", "Lake Tor"]  # Vane shares Oslar's neighbour
    assert not scored & {probe.prompt for record in found.spare for probe in record.locality}


def test_spread_takes_records_from_the_whole_file(file: Path) -> None:
    found = load_dataset("zsre", 3, str(file), order="spread")
    assert [record.subject for record in found.records] == ["Lake Quill", "Lake Oslar", "Lake Mirren"]


def test_records_that_were_looked_at_before_can_be_left_out(file: Path) -> None:
    found = load_dataset("zsre", 2, str(file), skip=3)
    assert [record.subject for record in found.records] == ["Lake Vane", "Lake Mirren"]
    assert [record.subject for record in found.spare] == [
        "Lake Quill",
        "Lake Brent",
    ]  # Oslar and Tor share a neighbour
    spread = load_dataset("zsre", 2, str(file), order="spread", skip=2)
    assert [record.subject for record in spread.records] == ["Lake Oslar", "Lake Mirren"]
    with pytest.raises(ValueError, match=r"has 2 records after the 4 that dataset\.skip leaves out; ask for fewer"):
        load_dataset("zsre", 3, str(file), skip=4)
    with pytest.raises(ValueError, match=r"dataset\.skip is -1"):
        load_dataset("zsre", 3, str(file), skip=-1)


def test_spread_asks_nothing_in_steps_that_were_left_out(tmp_path: Path) -> None:
    rewrites = [
        {"prompt": "{} lies in", "subject": name, "target_new": {"str": "Oslo"}, "target_true": {"str": "Rome"}}
        for name in ("Lake Quill", "Lake Brent")
    ]
    steps = (rewrites[:1], rewrites, rewrites)
    cases = [
        {"case_id": i, "requested_rewrite": of, "questions": ["?"], "new_answer": "!"} for i, of in enumerate(steps)
    ]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases), encoding="utf-8")
    asked = {
        order: [
            (one.case_id, len(one.portability))
            for one in load_dataset("mquake", edits, str(path), order=order).records
        ]
        for order, edits in (("first", 3), ("spread", 2))
    }
    assert asked == {"first": [("0", 1), ("1.0", 0), ("1.1", 1)], "spread": [("0", 1), ("1.1", 0)]}


def test_json_lines_are_read_as_a_list_is(tmp_path: Path, file: Path) -> None:
    lines = tmp_path / "set.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    assert load_records(lines) == load_records(file)


def test_a_file_of_a_data_set_on_the_hub_is_fetched_and_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, path: str, repo_type: str) -> str:
        asked.append((name, path, repo_type))
        return str(file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=fetch))
    found = load_dataset("mine", 2, "somebody/edits", "data/set.json")
    assert asked == [("somebody/edits", "data/set.json", "dataset")]
    assert found.records == load_dataset("zsre", 2, str(file)).records
    assert found.checksum == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_data_set_without_a_file_is_read_row_by_row(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, split: str) -> list[dict[str, Any]]:
        assert (name, split) == ("somebody/edits", "validation")
        return [*RECORDS]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fetch))
    found = load_dataset("mine", 2, "somebody/edits", split="validation")
    assert found.records == load_dataset("zsre", 2, str(file)).records
    assert len(found.checksum) == 64


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"edits": 7}, "edits is 7, but .* has 6 records; ask for fewer"),
        ({"edits": 0}, "edits is 0"),
        ({"edits": 2, "order": "random"}, "dataset.order is 'random'; choose first or spread"),
        ({"edits": 2, "shape": "zsra"}, "shape is 'zsra'; choose from zsre"),
        ({"edits": 2, "path": None}, "dataset.path is not set: the records of zsre do not come with this project"),
    ],
)
def test_a_wrong_wish_is_told_in_one_sentence(file: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_dataset("zsre", **{"path": str(file), **given})


def test_every_shape_has_a_configuration() -> None:
    conf = Path(__file__).parents[2] / "evaluation" / "conf" / "dataset"
    assert {f"{shape}.yaml" for shape in SHAPES} <= {path.name for path in conf.iterdir()}
