"""A step as bytes: factors, scope and ledger lines in one safetensors file, named by its own checksum."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from ..cache import TEMPORARY
from ..ledger import Edit
from ..state import Factors, Step
from .files import FolderError, read_checked, read_tensors, remove, write_bytes

NAME = re.compile(r"(\d{8})-([0-9a-f]{64})\.safetensors")
UNFINISHED = re.compile(rf"\.{NAME.pattern}\.{TEMPORARY}")
RECORD = "record"  # JSON in a tensor: what is no tensor


@dataclass(frozen=True)
class Written:
    """A step's file."""

    name: str
    after: str  # digest of the manifest, or SHA-256 of the step's file, that this one follows
    step: Step

    @property
    def digest(self) -> str:
        return self.name.removesuffix(".safetensors").rpartition("-")[2]


def pack(step: Step, after: str = "") -> bytes:
    told = {"sign": step.sign, "lines": [edit.to_dict() for edit in step.lines], "after": after}
    tensors = {RECORD: torch.from_numpy(np.frombuffer(json.dumps(told).encode(), dtype=np.uint8).copy())}
    for layer, factors in step.layers.items():
        tensors |= {f"layers.{layer}.{name}": t for name, t in vars(factors).items() if t is not None}
    tensors |= {f"scope.{name}": tensor for name, tensor in step.scope.items()}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def unpack(data: bytes) -> tuple[Step, str]:
    """The step, and what it follows."""
    tensors = read_tensors(data)
    told = json.loads(tensors.pop(RECORD).numpy().tobytes())
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name in [name for name in tensors if name.startswith("layers.")]:
        _, layer, part = name.split(".")
        layers.setdefault(int(layer), {})[part] = tensors.pop(name)
    step = Step(
        {
            i: Factors(parts["residual"], parts["coefficients"], parts.get("keys"))
            for i, parts in sorted(layers.items())
        },
        {name.removeprefix("scope."): tensor for name, tensor in tensors.items()},
        tuple(Edit.from_dict(line) for line in told["lines"]),
        told["sign"],
    )
    return step, told["after"]


def append(folder: Path, number: int, step: Step, after: str) -> Written:
    """Bring a step to the disk, as the one that follows `after`."""
    data = pack(step, after)
    name = f"{number:08d}-{hashlib.sha256(data).hexdigest()}.safetensors"
    try:
        write_bytes(folder / name, data)
    except BaseException:
        remove(folder / name)  # what was not promised must not be found either
        raise
    return Written(name, after, step)


def read(folder: Path, listed: list[str], after: str) -> list[Written]:
    """The steps of a folder in their order: those `listed`, and those that follow from `after`.

    Others are left behind by a process that was killed while it took them back.

    Raises:
        FolderError: a file is damaged or missing.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = NAME.fullmatch(path.name)
        if match is None:
            if not path.name.startswith("."):
                raise FolderError(f"{path}: not a step of a session; take it out of the folder")
            continue
        step, follows = unpack(read_checked(path, match[2]))
        found[path.name] = Written(path.name, follows, step)
    for name in listed:
        if name not in found:
            raise FolderError(f"{folder / name}: missing; restore the folder from a copy")
    steps = [found[name] for name in listed]
    following = {written.after: written for name, written in found.items() if name not in listed}
    while after in following:
        steps.append(following[after])
        after = steps[-1].digest
    return steps
