"""One state of a session as a folder (see the package), written as a whole and read with every byte checked."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from ..cache import TEMPORARY
from ..fingerprint import Vocabulary
from ..hparams import PLACES, CoachHooKHparams, shared
from ..ledger import Edit, Ledger
from ..memory import KeyMemory
from ..placement import Place
from ..state import Factors, History, LayerState, SessionState, Snapshot, Step, Tensors
from . import manifest as manifests
from . import steps
from .files import FolderError, TensorFile, read_checked, remove, sha256, write_tensors, write_text, writing
from .manifest import File, Manifest

Use = Literal["editing", "answering", "looking"]

STEPS = "steps"
OURS = re.compile(r"(hook_layers|memory)(-\d+)?\.safetensors|ledger(-\d+)?\.jsonl")
NUMBERED = re.compile(r"\w+-\d+\.\w+")  # among those
UNDER_WAY = ".coachhook.unfinished"  # while files are replaced: names of old and new ones, which nobody else made
UNFINISHED = re.compile(rf"\.({OURS.pattern}|{re.escape(manifests.NAME)}|{re.escape(UNDER_WAY)})\.{TEMPORARY}")


@dataclass(frozen=True)
class Record:
    """All that a folder tells of a session."""

    state: SessionState
    hparams: CoachHooKHparams
    prefixes: list[str] | None
    base_model: str
    dtype: str
    fingerprint: str
    vocabulary: Vocabulary | None
    sums: str | None
    gates: dict[int, Tensors]  # buffers of every hook layer's gate; empty without hook layers
    constants: Tensors  # of the scope


@dataclass(frozen=True)
class Contents:
    """What a folder tells."""

    manifest: Manifest
    hparams: CoachHooKHparams
    snapshot: Snapshot  # the newest state, without memories and scope where there is no `history`
    gates: dict[int, Tensors] | None  # None: steps follow the files that told of them
    history: History | None  # None without memory.safetensors
    constants: Tensors
    inside: int  # steps of the history that memory.safetensors holds; the others are
    trailing: list[steps.Written]


def holds_edits(folder: Path) -> bool:
    return (folder / manifests.NAME).is_file()


def write(folder: Path, record: Record, memory: bool = True) -> Manifest:
    """Make the folder tell of `record`. Renaming the new config decides; until then it tells what it told before.

    The caller holds the folder's lock.

    Raises:
        FolderError: the folder cannot be written, or the first edits there would replace somebody's file.
    """
    with writing(folder):
        before = Manifest.read(folder) if holds_edits(folder) else None
        if before is None:
            check_free(folder)
        revision = 1 if before is None else before.revision + 1
        state, history = record.state, record.state.history
        answers = None if history is None else history.answers
        tensors: dict[str, Tensors | str] = {
            "hook_layers": _answering(state, answers, record.gates),
            "ledger": "".join(json.dumps(edit.to_dict()) + "\n" for edit in state.ledger),
        }
        if memory and history is not None:
            tensors["memory"] = _going_on(history, record.constants)
        # Names that do not count yet, so that what counts stays whole until the new config does.
        names = {role: _named(role, revision) for role in tensors}
        counting = [] if before is None else [file.name for file in before.files.values()]
        left = _under_way(folder)  # by a killed process
        ours = {*left, *names.values(), *counting}
        try:
            write_text(folder / UNDER_WAY, json.dumps(sorted(ours)))
            files = {role: _written(folder / names[role], content) for role, content in tensors.items()}
        except BaseException:
            for name in names.values():
                remove(folder / name)
            if not left:
                remove(folder / UNDER_WAY)
            raise
        manifest = Manifest(
            base_model=record.base_model,
            dtype=record.dtype,
            fingerprint=record.fingerprint,
            vocabulary=record.vocabulary,
            sums=record.sums,
            hparams=shared(record.hparams.to_dict()) | {"model_name": record.base_model, "device": None},
            prefixes=record.prefixes,
            step=state.step,
            edits=state.edits,
            columns=None if answers is None else [[step.sign, step.edits] for step in answers],
            files=files,
            revision=revision,
        )
        manifest.write(folder)
    clean(folder, manifest, ())
    return manifest


def clean(folder: Path, manifest: Manifest, trailing: Collection[steps.Written]) -> None:
    """Remove what a killed process left behind, and what nothing has a use for any more.

    A file without a number may be somebody else's: it goes only where `UNDER_WAY` names it.
    """
    used = {file.name for file in manifest.files.values()} | {written.name for written in trailing}
    ours = _under_way(folder)
    for path in folder.glob("*"):
        name = path.name
        unused = name not in used and (name in ours or (OURS.fullmatch(name) and NUMBERED.fullmatch(name)))
        if unused or UNFINISHED.fullmatch(name):
            remove(path)
    for path in folder.glob(f"{STEPS}/*"):
        unused = path.name not in used and steps.NAME.fullmatch(path.name)
        if unused or steps.UNFINISHED.fullmatch(path.name):
            remove(path)
    remove(folder / UNDER_WAY)


def check_free(folder: Path) -> None:
    """For a folder without a config.

    Raises:
        FolderError: a file there would be replaced by edits, or taken for a part of them.
    """
    left = _under_way(folder)
    others = [path for path in folder.glob("*") if OURS.fullmatch(path.name) and path.name not in left]
    others += [path for path in folder.glob(f"{STEPS}/[!.]*.safetensors") if not steps.NAME.fullmatch(path.name)]
    if others:
        raise FolderError(
            f"{min(others)}: in the way of edits, which keep a file of that name, and without {manifests.NAME} it is "
            "not known to be theirs; move it elsewhere, or name another folder"
        )


def read(folder: Path, memory_device: Place | None = None, use: Use = "editing") -> Contents:
    """Everything in the folder, checked.

    Args:
        use: what for. To answer the memories are not read, but stay to be saved again; to look at the ledger and the
            scope no layer is.
        memory_device: where the memories shall rest from now on; None: where they did.

    Raises:
        FolderError: no edits there, a file that is missing or damaged, or a newer format.
    """
    manifest = Manifest.read(folder)
    try:
        return _read(folder, manifest, memory_device, use)
    except FolderError:
        if Manifest.read(folder).digest == manifest.digest:
            raise
        return read(folder, memory_device, use)  # its session has written all files anew in between
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        # The checksums are right, so it was written like that.
        raise FolderError(f"{folder}: its files do not fit together ({type(error).__name__}: {error})") from error


def _read(folder: Path, manifest: Manifest, memory_device: Place | None, use: Use) -> Contents:
    hparams = hparams_of(folder, manifest)
    hparams.memory_device = memory_device or hparams.memory_device
    layers = [] if use == "looking" else hparams.edited_layers
    tensors = _tensors(folder, manifest, "hook_layers")
    file = manifest.files["ledger"]
    lines = read_checked(folder / file.name, file.sha256).decode().splitlines()
    ledger: Ledger = tuple(Edit.from_dict(json.loads(line)) for line in lines)
    answers = None if manifest.columns is None else _factored(tensors, layers, manifest.columns)
    deltas = {layer: _delta(tensors, layer, answers) for layer in layers}
    snapshot = Snapshot({layer: LayerState(delta, None) for layer, delta in deltas.items()}, {}, ledger, manifest.step)
    gates: dict[int, Tensors] = {}
    for name in tensors.names:
        _, layer, kind, *rest = name.split(".", 3)
        if kind == "gate":
            gates.setdefault(int(layer), {})[rest[0]] = tensors[name]
    trailing = _steps(folder, manifest)
    history: History | None = None
    constants: Tensors = {}
    inside = 0
    if "memory" in manifest.files and (trailing or (folder / manifest.files["memory"].name).exists()):
        kept = _tensors(folder, manifest, "memory")
        place = hparams.memory_device if use == "editing" else None
        base, held = _kept(kept, layers, place, manifest.step)
        constants, inside = kept.under("constants."), len(held)
        folded = () if base.step == 0 else None if answers is None else answers[: base.step]
        left = {} if place else {layer: kept.mapped(f"layers.{layer}.memory") for layer in layers}
        history = History(base, held, folded, left)
        at_files = history.at(manifest.step)
        if any(not torch.equal(at_files.layers[i].delta, deltas[i]) for i in layers):
            raise FolderError(f"{folder}: hook_layers and memory do not belong together; restore it from a copy")
        history = replace(history, steps=(*held, *(written.step for written in trailing)))
        snapshot = at_files
        for written in trailing:
            snapshot = snapshot.after(written.step)
    elif trailing:
        raise FolderError(
            f"{folder}: memory.safetensors is missing, and {len(trailing)} later steps need it; restore it from a copy"
        )
    return Contents(manifest, hparams, snapshot, None if trailing else gates, history, constants, inside, trailing)


def hparams_of(folder: Path, manifest: Manifest) -> CoachHooKHparams:
    """The hyperparameters that the edits of a folder were made with.

    Raises:
        FolderError: a newer release has added to them, or somebody a place to write to.
    """
    if new := set(manifest.hparams) - {f.name for f in fields(CoachHooKHparams)}:
        raise FolderError(
            f"{folder}: has hyperparameters that this release lacks ({', '.join(sorted(new))}); {manifests.UPDATE}"
        )
    if named := sorted(name for name in PLACES if manifest.hparams.get(name) is not None):
        raise FolderError(
            f"{folder / manifests.NAME}: damaged, it names places of its own ({', '.join(named)}), which no session "
            "writes; restore the folder from a copy"
        )
    return CoachHooKHparams(**shared(manifest.hparams))  # the model is there: its name needs no looking up


def _steps(folder: Path, manifest: Manifest) -> list[steps.Written]:
    return steps.read(folder / STEPS, manifest.steps, manifest.digest)


def _tensors(folder: Path, manifest: Manifest, role: str) -> TensorFile:
    file = manifest.files[role]
    return TensorFile(folder / file.name, file.sha256)


def _named(role: str, revision: int) -> str:
    """A name that no earlier revision had, and only in the first that of a file which may be another's."""
    ending = "jsonl" if role == "ledger" else "safetensors"
    return f"{role}.{ending}" if revision == 1 else f"{role}-{revision}.{ending}"


def _under_way(folder: Path) -> set[str]:
    """What `UNDER_WAY` names, where it is: our files, whether the config tells of them or not."""
    try:
        names = json.loads((folder / UNDER_WAY).read_bytes())
        return {name for name in names if OURS.fullmatch(name)}
    except (OSError, ValueError, TypeError, RecursionError):
        return set()


def _written(path: Path, content: Tensors | str) -> File:
    if isinstance(content, str):
        write_text(path, content)
    else:
        write_tensors(path, content)
    return File(path.name, path.stat().st_size, sha256(path))


def _answering(state: SessionState, answers: tuple[Step, ...] | None, gates: dict[int, Tensors]) -> Tensors:
    told: Tensors = {}
    for layer, of in state.layers.items():
        if answers is None:
            told[f"layers.{layer}.delta"] = of.delta
        elif answers:
            for part in ("residual", "coefficients"):  # all steps side by side
                columns = [getattr(step.layers[layer], part) for step in answers]
                told[f"layers.{layer}.{part}"] = torch.cat(columns, dim=1)
        else:
            d, m = of.delta.shape
            told |= {f"layers.{layer}.residual": torch.zeros(d, 0), f"layers.{layer}.coefficients": torch.zeros(m, 0)}
    told |= {f"layers.{i}.gate.{name}": t for i, buffers in gates.items() for name, t in buffers.items()}
    return told


def _factored(tensors: TensorFile, layers: Iterable[int], columns: list[list[int]]) -> tuple[Step, ...]:
    widths = [width for _, width in columns]
    split = {
        layer: [torch.split(tensors[f"layers.{layer}.{part}"], widths, dim=1) for part in ("residual", "coefficients")]
        for layer in layers
    }
    return tuple(
        Step({layer: Factors(r[i], x[i], None) for layer, (r, x) in split.items()}, sign=sign)
        for i, (sign, _) in enumerate(columns)
    )


def _delta(tensors: TensorFile, layer: int, answers: tuple[Step, ...] | None) -> torch.Tensor:
    if answers is None:
        return tensors[f"layers.{layer}.delta"]
    residual, coefficients = (tensors.mapped(f"layers.{layer}.{part}") for part in ("residual", "coefficients"))
    state = LayerState(torch.zeros(len(residual), len(coefficients)), None)
    for step in answers:
        state = step.layers[layer].written(state, step.sign)
    return state.delta


def _going_on(history: History, constants: Tensors) -> Tensors:
    told: Tensors = {f"constants.{name}": tensor for name, tensor in constants.items()}
    told |= {f"scope.{name}": tensor for name, tensor in history.base.scope.items()}
    for layer, of in history.base.layers.items():
        matrix = history.left[layer] if of.memory is None else of.memory.matrix
        told |= {f"layers.{layer}.delta": of.delta, f"layers.{layer}.memory": matrix}
    for i, step in enumerate(history.steps):
        told[f"steps.{i}"] = torch.frombuffer(bytearray(steps.pack(step)), dtype=torch.uint8)
    told["ledger"] = _as_tensor([edit.to_dict() for edit in history.base.ledger])
    return told


def _kept(
    tensors: TensorFile, layers: Iterable[int], place: Place | None, step: int
) -> tuple[Snapshot, tuple[Step, ...]]:
    """Where the history begins, with the memories in `place` or none, and the steps from there to `step`."""
    held: list[Step] = []
    while (name := f"steps.{len(held)}") in tensors.names:
        told, _ = steps.unpack(tensors[name].numpy().tobytes())
        held.append(replace(told, layers={layer: told.layers[layer] for layer in layers}))
    base = Snapshot(
        {
            i: LayerState(
                tensors[f"layers.{i}.delta"],
                KeyMemory(tensors[f"layers.{i}.memory"]).resting(place) if place else None,
            )
            for i in layers
        },
        tensors.under("scope."),
        tuple(Edit.from_dict(line) for line in json.loads(tensors["ledger"].numpy().tobytes())),
        step - len(held),
    )
    return base, tuple(held)


def _as_tensor(content: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
