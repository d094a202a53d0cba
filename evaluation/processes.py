"""Processes that a command starts: what they find where they work, and that they end when the command does."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

# Environment variable: host and process of the command, for processes that a launcher starts.
COMMAND = "COACHHOOK_EVALUATION_COMMAND"
# Folders that may be named from where the command is given.
NAMED_FOLDERS = ("EASYEDIT_HOME", "COACHHOOK_CACHE")


def worker_environment() -> dict[str, str]:
    """For a process that will work in another folder: it finds this project, and the folders named from this one."""
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    named = {name: os.path.abspath(os.environ[name]) for name in NAMED_FOLDERS if os.environ.get(name)}
    return {**os.environ, **named, "PYTHONPATH": os.pathsep.join(paths)}


def announce() -> None:
    """Tell processes that this one will start which command they belong to."""
    os.environ[COMMAND] = f"{platform.node()}:{os.getpid()}"


def command() -> list[int]:
    """The command's process, if it is another one on this machine: joblib's outlive it."""
    host, _, process = os.environ.get(COMMAND, "").rpartition(":")
    return [int(process)] if host == platform.node() and int(process) != os.getpid() else []


def end_with(processes: Sequence[int]) -> None:
    """From here on, this process ends as soon as one of `processes` is gone."""
    if processes:
        threading.Thread(target=_watch, args=(processes,), daemon=True).start()


def _watch(processes: Sequence[int]) -> None:
    while all(map(_is_running, processes)):
        time.sleep(0.1)
    os._exit(1)  # as a kill would: what is written so far, the next call goes on from


def _is_running(process: int) -> bool:
    """Whether there is more left of it than its exit status."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
