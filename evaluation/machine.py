"""What figures of time were taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")  # of Linux; `platform.processor` is empty on most of them


def processor() -> str:
    """The CPU as the machine calls it, with its family and model, as virtual machines hide the name; and its cores."""
    try:
        lines = [line.partition(":") for line in CPUINFO.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    told = {name.strip(): value.strip() for name, _, value in reversed(lines)}  # of the first core
    name = told.get("model name") or platform.processor() or platform.machine()
    kind = f", family {told['cpu family']} model {told['model']}" if {"cpu family", "model"} <= told.keys() else ""
    return f"{name}{kind}, {os.cpu_count()} cores"
