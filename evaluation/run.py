"""The leaderboard's command: methods of the toolkit under one protocol, on Hydra.

    python -m evaluation.run -m method=coachhook,memit dataset=facts
    EASYEDIT_HOME=... python -m evaluation.run method=wise dataset=zsre dataset.path=zsre.json edits=60

Groups are `model`, `dataset`, `method`, `protocol` and `experiment` (under `evaluation/conf`); every method runs in a
process of its own. `results/<run>/jobs/` gets a folder for each combination, named after all that it depends on, and
`results/<run>/leaderboard.*` what they say together. A killed run goes on where it stopped when it is called again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import yaml
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from .journal import BUSY, CONFIG, DONE, FAILED, LOCK
from .methods.settings import inner_settings, settings
from .processes import announce, command, end_with, worker_environment
from .sources import load_dataset

CONF = Path(__file__).parent / "conf"
# What changes no score of a run, and so is no part of its name.
FREE = ("run", "out", "snapshots", "threads", "again")
FREE_METRICS = ("forward_repeats",)
# Files are known by their content, wherever they lie.
PLACES = ("path", "file", "split")
IN_USE = "another process is at work in its folder; wait for it, or end it"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(given: DictConfig) -> None:
    """One combination. What cannot be run is told at the end, so that the others of a sweep are."""
    try:
        config = resolved(given)
    except Exception as error:  # Hydra would end the sweep without a leaderboard
        known = isinstance(error, ValueError | OSError)  # says by itself what is wrong
        asked = HydraConfig.get().job.override_dirname
        name = "-".join(filter(None, (slug(asked)[:80], _digest(asked), "refused")))
        _fail(Path(given.out) / given.run / "jobs" / name, f"{'' if known else f'{type(error).__name__}: '}{error}")
    else:
        run_job(config)


def resolved(given: DictConfig) -> dict[str, Any]:
    """The configuration with everything that it refers to in it: hyperparameters, and the checksum of the data.

    Raises:
        ValueError: something in it cannot be done.
    """
    config: dict[str, Any] = OmegaConf.to_container(given, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    method, model = config["method"], config["model"]
    changes = {**method.pop("settings"), **method["overrides"]}
    if method["name"] == "coachhook":  # its hyperparameters have a seed of their own
        changes.setdefault("seed", config["seed"])
    if model["device"] is not None:
        changes["device"] = model["device"]
    check_protocol(config)
    own = method.pop("hparams")
    if own:
        method["file"] = Path(own).name
    config["hparams"] = settings(method["name"], model["name"], changes, own)
    data = load_dataset(edits=config["edits"], **config["dataset"])
    config["dataset"] = {**config["dataset"], "checksum": data.checksum, "skipped": data.skipped}
    if config["held_text"]:
        config["held_checksum"] = hashlib.sha256(Path(config["held_text"]).read_bytes()).hexdigest()
    config["base_hparams"] = inner_settings(config["hparams"], model["name"], method.pop("base_hparams", None))
    texts = texts_of(config)
    if texts:
        config["texts"] = texts
    config["toolkit"] = "checkout" if os.environ.get("EASYEDIT_HOME") else "release"
    return config


def check_protocol(config: dict[str, Any]) -> None:
    """Raises ValueError where the steps are not among the edits, or scores are asked of a method that has none."""
    protocol, edits = config["protocol"], config["edits"]
    every, steps = protocol.get("every"), protocol.get("evaluate_at") or []
    if every is not None and every < 1:
        raise ValueError(f"protocol.every is {every}; give a number of edits, from 1 on, or null")
    if any(not 1 <= step <= edits for step in steps):
        raise ValueError(f"protocol.evaluate_at is {steps}; give numbers of edits, from 1 to {edits} (edits)")
    if protocol.get("key_scores") and config["method"]["name"] != "coachhook":
        name = config["method"]["label"]
        raise ValueError(
            f"protocol.key_scores is for CoachHooK; {name} has no hook layers: say protocol.key_scores=false"
        )


def texts_of(config: dict[str, Any]) -> dict[str, str]:
    """Checksums of the files that the key statistics are made from, where a user gives files of their own."""
    statistics = config["model"]["statistics"]
    shared = yaml.safe_load(Path(statistics).read_text(encoding="utf-8")) if _is_file(statistics) else {}
    named = {
        "statistics": statistics,
        "mom2_dataset": config["hparams"].get("mom2_dataset"),
        "base_hparams.mom2_dataset": (config["base_hparams"] or {}).get("mom2_dataset"),
        "statistics.mom2_dataset": shared.get("mom2_dataset"),
    }
    files = {name: Path(path) for name, path in named.items() if _is_file(path)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def _is_file(name: Any) -> bool:
    return isinstance(name, str) and Path(name).is_file()


def key(config: dict[str, Any]) -> str:
    """A short name for everything that a user sets of what a job's figures depend on: not for versions of programs."""
    kept = {name: value for name, value in without_folders(config).items() if name not in (*FREE, "held_text")}
    kept["dataset"] = {name: value for name, value in kept["dataset"].items() if name not in PLACES}
    kept["metrics"] = {name: value for name, value in kept["metrics"].items() if name not in FREE_METRICS}
    return _digest(json.dumps(kept, sort_keys=True, default=str))


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the files that key statistics are made from by their names alone: what is in them stands
    beside them as checksums."""
    kept = copy.deepcopy(config)
    for holder in (kept["model"], kept["hparams"], kept["base_hparams"] or {}, kept["method"]["overrides"]):
        for name in ("statistics", "mom2_dataset", "stats_dir"):
            if isinstance(holder.get(name), str) and Path(holder[name]).exists():
                holder[name] = Path(holder[name]).name
    return kept


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def job_folder(config: dict[str, Any]) -> Path:
    """Where a job's results are."""
    parts = (config["method"]["label"], config["dataset"]["name"], config["protocol"]["name"])
    name = "-".join(map(slug, parts))
    size = f"{config['edits']}x{config['batch_size']}"
    return Path(config["out"], config["run"], "jobs", f"{name}-{size}-{key(config)}")


def slug(text: str) -> str:
    """A part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def run_job(config: dict[str, Any]) -> None:
    """Run one combination in a process of its own, unless its results are there.

    A failure is written beside the results and told at the end (`leaderboard.AtTheEnd`), so that a sweep goes on.
    """
    end_with(command())
    folder = job_folder(config)
    if config["again"] and not emptied(folder):
        _fail(folder, IN_USE)
        return
    if (folder / DONE).is_file():
        print(f"{folder.name}: done already", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(shareable(config), sort_keys=False), encoding="utf-8")
    (folder / FAILED).unlink(missing_ok=True)
    print(f"{folder.name}", flush=True)
    given = json.dumps({**config, "began": [os.getpid(), *command()]})
    worker = [sys.executable, "-m", "evaluation.worker", str(folder)]
    done = subprocess.run(worker, input=given, text=True, env=worker_environment())
    if done.returncode == BUSY:
        _fail(folder, IN_USE)
    elif done.returncode and not (folder / FAILED).is_file():
        _fail(folder, f"its process ended with status {done.returncode}")


def emptied(folder: Path) -> bool:
    """Forget what is in a job's folder; False where another process is at work there."""
    if not folder.is_dir():
        return True
    try:
        with FileLock(folder / LOCK, timeout=0):
            (folder / DONE).unlink(missing_ok=True)  # first: what is killed from here on is no finished job
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
    except Timeout:
        return False
    return True


def _fail(folder: Path, why: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).write_text(f"{why}\n", encoding="utf-8")


def shareable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the folders of this machine: files by their names."""
    kept = {name: value for name, value in without_folders(config).items() if name != "out"}
    kept["held_text"] = kept["held_text"] and Path(kept["held_text"]).name
    path = kept["dataset"]["path"]
    if path and Path(path).expanduser().exists():
        kept["dataset"]["path"] = Path(path).name
    for of in (kept["hparams"], kept["method"]["overrides"]):
        if "model_name" in of and Path(of["model_name"]).is_dir():
            of["model_name"] = Path(of["model_name"]).name
    return kept


if __name__ == "__main__":
    announce()
    main()
