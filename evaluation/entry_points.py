"""The toolkit's own way of editing and scoring, and our scores in its JSON shape.

`editor.batch_edit` and `editor.edit` score each edit right after it is made. Their results are kept as they are; a
consecutive run is written in the same shape, so that the toolkit's `summary_metrics` reads both.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from .data import Probe, Record, answerable
from .journal import Journal
from .methods.peers import Peer, set_batch_size
from .metrics import agreement
from .protocol import BEFORE, Reading, after_phase

ENTRY_POINTS = ("batch_edit", "edit")


def entry_point(
    method: Any, records: Sequence[Record], name: str, batch_size: int, sequential: bool
) -> list[dict[str, Any]]:
    """Edit `records` through the toolkit's editor.

    Raises:
        ValueError: the toolkit at hand cannot do this with the method.
    """
    editor = method.editor
    size = 1 if name == "edit" else batch_size
    if name == "batch_edit" and method.one_by_one:
        raise ValueError(f"the toolkit cannot edit batches with {method.name}; say protocol=edit")
    if sequential and name == "batch_edit" and isinstance(method, Peer) and not _of_checkout(editor.batch_edit):
        raise ValueError(
            f"the release's batch_edit scores {method.name}'s `pre` after it has written edits that stay, so that no "
            "locality could be told; say protocol=consecutive, or set EASYEDIT_HOME to a checkout"
        )
    if name == "batch_edit" and batch_size > 1 and method.name == "FT" and not _of_checkout(editor.batch_edit):
        raise ValueError(
            "the release's FT pads the facts of a training step and then learns at the wrong place; say "
            "protocol=edit, or set EASYEDIT_HOME to a checkout"
        )
    parts = [records[start : start + size] for start in range(0, len(records), size)]
    if not sequential:
        parts = [answerable(part) for part in parts]
    if name == "edit":
        parts = [[record for part in parts for record in part]]
    # One call for each batch: the release's tells the scores of its last one only, UltraEdit's takes no short one.
    found = []
    for part in parts:
        set_batch_size(editor.hparams, min(size, len(part)))
        found += _edited(method, part, name, sequential)
    return found


def _of_checkout(entry: Any) -> bool:
    """Whether an entry method is a checkout's; the release's keep what they put back, and score afterwards."""
    return "keep_original_weight" not in inspect.signature(entry).parameters


def _edited(method: Any, records: Sequence[Record], name: str, sequential: bool) -> list[dict[str, Any]]:
    """One call of the toolkit's editor."""
    entry = getattr(method.editor, name)
    known = inspect.signature(entry).parameters
    extra: dict[str, Any] = {"subject": [record.subject for record in records]}
    if "sequential_edit" in known:
        extra["sequential_edit"] = sequential
    if "keep_original_weight" in known:  # the release: what is kept is put back after each call
        extra["keep_original_weight"] = not sequential
    if all(record.rephrases for record in records):
        extra["rephrase_prompts"] = [record.rephrases[0] for record in records]
    if getattr(method, "loc_prompts", None):
        prompts = list(method.loc_prompts)
        extra["loc_prompts"] = [prompts[i % len(prompts)] for i in range(len(records))]
    # The release's batch_edit hands these on by place, whatever it calls them.
    places = ("locality_inputs", "portability_inputs")
    if "locality_inputs" not in known:
        places = ("locality_prompts", "locality_ground_truth")
    probes = ([record.locality for record in records], [record.portability for record in records])
    gaps = _of_checkout(entry)
    extra |= {place: _by_kind(of, gaps) for place, of in zip(places, probes, strict=True)}
    found, _, _ = entry(
        prompts=[record.prompt for record in records],
        target_new=[record.target_new for record in records],
        ground_truth=[record.ground_truth or "<|endoftext|>" for record in records],
        **extra,
    )
    return [
        {**_with_locality(metric), "case_id": record.case_id, "time": metric.get("time", 0.0)}
        for metric, record in zip(found, records, strict=True)
    ]


def _with_locality(metric: dict[str, Any]) -> dict[str, Any]:
    """With `<kind>_acc` beside each locality output, which the release's batch_edit leaves to its reader."""
    post, pre = metric["post"], metric["pre"]
    for name in [name for name in post["locality"] if name.endswith("_output") and name in pre["locality"]]:
        pairs = zip(pre["locality"][name], post["locality"][name], strict=True)
        post["locality"].setdefault(f"{name.removesuffix('_output')}_acc", [agreement(b, a) for b, a in pairs])
    return metric


def _by_kind(probes: Sequence[Sequence[Probe]], gaps: bool) -> dict[str, dict[str, list[Any]]]:
    """The toolkit's `{kind: {prompt: [...], ground_truth: [...]}}`: an entry for each record, None if it has none.

    The release allows no `gaps`: there, kinds that some records lack are left out.
    """
    kinds = list(dict.fromkeys(probe.kind for row in probes for probe in row))
    if not gaps:
        kinds = [kind for kind in kinds if all(any(probe.kind == kind for probe in row) for row in probes)]
    return {
        kind: {
            "prompt": [[p.prompt for p in row if p.kind == kind] or None for row in probes],
            "ground_truth": [[p.answer for p in row if p.kind == kind] or None for row in probes],
        }
        for kind in kinds
    }


def toolkit_shape(records: Sequence[Record], journal: Journal) -> list[dict[str, Any]]:
    """A complete consecutive run as the toolkit's editors return one."""
    old, new = journal.phase(BEFORE), journal.phase(after_phase(len(records)))
    assert old is not None
    assert new is not None
    times = [told["seconds"] for told in journal.batches() for _ in range(told["edits"])]
    found = []
    for record, before, after, seconds in zip(records, old.rows, new.rows, times, strict=True):
        pre, post = Reading.from_dict(before), Reading.from_dict(after)
        found.append(
            {
                "case_id": record.case_id,
                "requested_rewrite": record.request(),
                "time": seconds,
                "pre": _scores(record, pre, None),
                "post": _scores(record, post, pre),
            }
        )
    return found


def _scores(record: Record, reading: Reading, before: Reading | None) -> dict[str, Any]:
    scores: dict[str, Any] = {"rewrite_acc": [answer.accuracy for answer in reading.prompt]}
    if reading.rephrases:
        scores["rephrase_acc"] = [reading.rephrases[0].accuracy]  # the toolkit asks one
    locality: dict[str, list[Any]] = {}
    for i, (probe, answer) in enumerate(zip(record.locality, reading.locality, strict=True)):
        locality.setdefault(f"{probe.kind}_output", []).append(answer.said)
        if before is not None:
            locality.setdefault(f"{probe.kind}_acc", []).append(agreement(before.locality[i].said, answer.said))
    portability: dict[str, list[float]] = {}
    for probe, answer in zip(record.portability, reading.portability, strict=True):
        portability.setdefault(f"{probe.kind}_acc", []).append(answer.accuracy)
    return {**scores, "locality": locality, "portability": portability}
