"""The process in which one method runs: `python -m evaluation.worker <folder>`, its configuration as JSON on stdin."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .data import HELD_TEXT, Record, load_facts
from .entry_points import ENTRY_POINTS, entry_point, toolkit_shape
from .journal import ABOUT, BUSY, DONE, FAILED, LOCK, RECORDS, TOOLKIT, Folder, write_json
from .machine import processor
from .methods import CoachHooK, Peer, build
from .processes import end_with
from .protocol import EditingMethod, Plan, run, seed_everything
from .sources import Dataset, load_dataset

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "easyeditor", "coachhook-plugin")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    config = json.load(sys.stdin)
    end_with(config.pop("began", []))
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit(BUSY)
    try:
        work(config, folder)
    except Exception as error:
        known = isinstance(error, ValueError)  # says by itself what is wrong
        text = f"{error}\n" if known else f"{type(error).__name__}: {error} (see {FAILED} in its folder)\n"
        (folder / FAILED).write_text(f"{text}\n{traceback.format_exc()}", encoding="utf-8")
        sys.exit(1)


def work(config: dict[str, Any], folder: Path) -> None:
    """Run what `config` says; leaves `done.json` as the last thing."""
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    given = {name: value for name, value in config["dataset"].items() if name not in ("checksum", "skipped")}
    data = load_dataset(edits=config["edits"], **given)
    held = (Path(config["held_text"]) if config["held_text"] else HELD_TEXT).read_text(encoding="utf-8")
    settle_paths(config)
    write_json(folder / RECORDS, [asdict(record) for record in data.records])
    write_json(folder / ABOUT, with_earlier(about(config, data), folder / ABOUT))
    os.chdir(folder)  # the toolkit writes its logs into the working directory
    seed_everything(config["seed"])
    method = build(
        config["method"]["name"],
        config["model"]["name"],
        folder,
        config["hparams"],
        config["model"]["statistics"],
        config["base_hparams"],
    )
    if isinstance(method, Peer) and method.wants_loc_prompts:
        method.loc_prompts = left_alone(data)
    protocol = config["protocol"]
    journal = Folder(folder, config["snapshots"])
    if protocol["name"] in ENTRY_POINTS:
        method.prepare()  # else the time of its first edit holds it
        seed_everything(config["seed"])
        found = entry_point(method, data.records, protocol["name"], config["batch_size"], protocol["sequential"])
        write_json(folder / TOOLKIT, found)
    else:
        run(method, data.records, plan(config, held), journal)
        if protocol["name"] == "consecutive":
            write_json(folder / TOOLKIT, toolkit_shape(data.records, journal))
    one_by_one = protocol["name"] == "edit" or (protocol["name"] != "single" and method.one_by_one)
    finished = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_json(folder / DONE, {"finished": finished, "batch_size": 1 if one_by_one else config["batch_size"]})
    journal.forget_scratch()
    (folder / FAILED).unlink(missing_ok=True)  # of a call that found this one at work


def settle_paths(config: dict[str, Any]) -> None:
    """Files and folders that are named from where the command was given; the worker moves elsewhere."""
    for holder, names in (
        (config["hparams"], ("model_name", "mom2_dataset", "stats_dir")),
        (config["model"], ("statistics",)),
    ):
        for name in names:
            if isinstance(holder.get(name), str) and Path(holder[name]).exists():
                holder[name] = str(Path(holder[name]).resolve())


def plan(config: dict[str, Any], held: str) -> Plan:
    """The protocol of a configuration."""
    protocol, metrics = config["protocol"], config["metrics"]
    every = protocol.get("every")
    steps = (*(protocol.get("evaluate_at") or ()), *(range(every, config["edits"] + 1, every) if every else ()))
    return Plan(
        batch_size=config["batch_size"],
        held_text=held,
        reset=protocol["name"] == "single",
        evaluate_at=steps,
        rivals=metrics["success"],
        new_tokens=metrics["new_tokens"],
        forward_repeats=metrics["forward_repeats"],
        held_window=metrics["held_window"],
        held_tokens=metrics["held_tokens"],
        seed=config["seed"],
        extra=key_scores if protocol.get("key_scores") else None,
    )


def key_scores(method: EditingMethod, records: Sequence[Record]) -> list[dict[str, Any]]:
    """||Delta k|| of every token of each edited prompt by layer, and which token is the subject's last."""
    assert isinstance(method, CoachHooK)  # `run.resolved` has seen to it
    return [{"norms": norms, "subject": place} for norms, place in map(method.norms, records)]


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


def about(config: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """What the figures were made with."""
    asked = config["hparams"].get("device")
    on_cuda = torch.cuda.is_available() and asked not in ("cpu", "mps")
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    if config["toolkit"] == "checkout":  # then the installed release, if there is one, is not what ran
        del versions["easyeditor"]
    return {
        "versions": versions,
        "toolkit": config["toolkit"],
        "toolkit_commit": _commit(os.environ.get("EASYEDIT_HOME")) if config["toolkit"] == "checkout" else None,
        "project_commit": _commit(str(Path(__file__).parent.parent)),
        "machine": platform.machine(),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if on_cuda else str(asked),
        "threads": torch.get_num_threads(),
        "seed": config["seed"],
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
