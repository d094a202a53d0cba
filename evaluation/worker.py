"""The process in which one method runs: `python -m evaluation.worker <folder>`, its configuration as JSON on stdin."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from coachhook_plugin.cache import write_whole

from .data import Record, load_facts
from .entry_points import ENTRY_POINTS, entry_point, toolkit_shape
from .journal import ABOUT, BUSY, DONE, FAILED, LOCK, RECORDS, TOOLKIT, Folder
from .methods import build
from .protocol import EditingMethod, Plan, run, seed_everything
from .sources import Dataset, load_dataset

HELD_TEXT = Path(__file__).parent / "facts" / "held_text.txt"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "easyeditor", "coachhook-plugin")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    told = json.load(sys.stdin)
    if parent := told.pop("parent", None):
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit(BUSY)
    try:
        work(told, folder)
    except Exception as error:
        known = isinstance(error, ValueError)  # says by itself what is wrong
        text = f"{error}\n" if known else f"{type(error).__name__}: {error} (see {FAILED} in its folder)\n"
        (folder / FAILED).write_text(f"{text}\n{traceback.format_exc()}", encoding="utf-8")
        sys.exit(1)


def work(told: dict[str, Any], folder: Path) -> None:
    """Run what `told` says; leaves `done.json` as the last thing."""
    if told["threads"]:
        torch.set_num_threads(told["threads"])
    given = {name: value for name, value in told["dataset"].items() if name not in ("checksum", "skipped")}
    data = load_dataset(edits=told["edits"], **given)
    held = (Path(told["held_text"]) if told["held_text"] else HELD_TEXT).read_text(encoding="utf-8")
    settle_paths(told)
    write(folder / RECORDS, [asdict(record) for record in data.records])
    write(folder / ABOUT, with_earlier(about(told, data), folder / ABOUT))
    os.chdir(folder)  # the toolkit writes its logs into the working directory
    seed_everything(told["seed"])
    method = build(
        told["method"]["name"],
        told["model"]["name"],
        folder,
        told["hparams"],
        told["model"]["statistics"],
        told["base_hparams"],
    )
    if getattr(method, "algorithm", "") == "WISE":
        method.loc_prompts = left_alone(data)
    protocol = told["protocol"]
    journal = Folder(folder, told["snapshots"])
    if protocol["name"] in ENTRY_POINTS:
        method.prepare()  # else the time of its first edit holds it
        seed_everything(told["seed"])
        found = entry_point(method, data.records, protocol["name"], told["batch_size"], protocol["sequential"])
        write(folder / TOOLKIT, found)
    else:
        run(method, data.records, plan(told, held), journal)
        if protocol["name"] == "consecutive":
            write(folder / TOOLKIT, toolkit_shape(data.records, journal))
    one_by_one = protocol["name"] == "edit" or getattr(method, "one_by_one", False)
    finished = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write(folder / DONE, {"finished": finished, "batch_size": 1 if one_by_one else told["batch_size"]})
    journal.forget_state()
    (folder / FAILED).unlink(missing_ok=True)  # of a call that found this one at work


def end_with(parent: int) -> None:
    """Leave when the process that began this one is gone: a killed command shall not go on computing unseen."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)  # as a kill would: what is written so far, the next call goes on from


def settle_paths(told: dict[str, Any]) -> None:
    """Files and folders that are named from where the command was given; the worker moves elsewhere."""
    for holder, names in (
        (told["hparams"], ("model_name", "mom2_dataset", "stats_dir")),
        (told["model"], ("statistics",)),
    ):
        for name in names:
            if isinstance(holder.get(name), str) and Path(holder[name]).exists():
                holder[name] = str(Path(holder[name]).resolve())


def plan(told: dict[str, Any], held: str) -> Plan:
    """The protocol of a configuration."""
    protocol, metrics = told["protocol"], told["metrics"]
    every = range(protocol["every"], told["edits"] + 1, protocol["every"]) if protocol["every"] else ()
    return Plan(
        batch_size=told["batch_size"],
        held_text=held,
        reset=protocol["name"] == "single",
        evaluate_at=(*protocol["evaluate_at"], *every),
        rivals=metrics["success"],
        new_tokens=metrics["new_tokens"],
        forward_repeats=metrics["forward_repeats"],
        held_window=metrics["held_window"],
        held_tokens=metrics["held_tokens"],
        seed=told["seed"],
        extra=key_scores if protocol["key_scores"] else None,
    )


def key_scores(method: EditingMethod, records: Sequence[Record]) -> list[dict[str, Any]]:
    """||Delta k|| of every token of each edited prompt by layer, and which token is the subject's last."""
    norms = getattr(method, "norms", None)
    if norms is None:
        raise ValueError(f"protocol.key_scores is for CoachHooK; {method.name} has no hook layers")
    rows = []
    for record in records:
        before = record.prompt[: record.prompt.index(record.subject) + len(record.subject)]
        place = len(method.tokenizer(before)["input_ids"]) - 1
        rows.append({"norms": norms(record.prompt), "subject": place})
    return rows


def left_alone(data: Dataset) -> list[str]:
    """Texts for a method that also learns what to leave alone: neighbours that nobody scores.

    Of the data set's other records, or else of the shipped facts.
    """
    scored = {probe.prompt for record in data.records for probe in record.locality}
    for records in (data.spare, load_facts()):
        probes = [record.locality[0] for record in records if record.locality]
        found = [f"{probe.prompt} {probe.answer}" for probe in probes if probe.prompt not in scored]
        if found:
            return found
    raise ValueError(
        f"{data.name}: every record is edited and scored, so that no text is left that a method may learn to leave "
        "alone; give fewer edits"
    )


def about(told: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """What the figures were made with."""
    asked = told["hparams"].get("device")
    on_cuda = torch.cuda.is_available() and asked not in ("cpu", "mps")
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    if told["toolkit"] == "checkout":  # then the installed release, if there is one, is not what ran
        del versions["easyeditor"]
    return {
        "versions": versions,
        "toolkit": told["toolkit"],
        "toolkit_commit": _commit(os.environ.get("EASYEDIT_HOME")) if told["toolkit"] == "checkout" else None,
        "project_commit": _commit(str(Path(__file__).parent.parent)),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if on_cuda else str(asked),
        "threads": torch.get_num_threads(),
        "seed": told["seed"],
        "data": {"name": data.name, "sha256": data.checksum, "skipped": data.skipped},
    }


def with_earlier(now: dict[str, Any], path: Path) -> dict[str, Any]:
    """`now`, and under "earlier" what a run that goes on was begun with, where that differs."""
    if not path.is_file():
        return now
    old = json.loads(path.read_text(encoding="utf-8"))
    earlier = old.pop("earlier", [])
    if old != now:
        earlier = [*earlier, old]
    return {**now, "earlier": earlier} if earlier else now


def write(path: Path, content: Any) -> None:
    """A JSON file; numbers of numpy become plain ones."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=lambda value: value.item())
    write_whole(path, lambda stream: stream.write(f"{text}\n".encode()))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: str | None) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder or ".", "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    main()
