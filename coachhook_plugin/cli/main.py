"""`coachhook`: edit a model, and look after its edits, from the shell."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm.auto import tqdm

from ..cache import cache_dir, is_kept, write_whole
from ..hparams import FREE, PLACES, CoachHooKHparams, differing
from ..ledger import Edit
from ..persistence import load_edits
from ..placement import Place
from ..session import EditSession
from ..shipped import shipped_hparams
from ..store import Contents, FolderError, holds_edits, hparams_of, read
from ..store.manifest import Manifest
from .facts import ByLine, FactsError, batches, check_facts, edit_facts, outstanding, read_facts

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
Answer = dict[str, Any]

EXAMPLES = """
examples:
  coachhook edit facts.jsonl --model smollm2-135m --out edits/ --batch-size 10
  coachhook edit facts.jsonl --model smollm2-135m --out edits/ --resume     # after a crash, or with more facts
  coachhook inspect edits/
  coachhook show edits/ Darrieux
  coachhook generate edits/ "The mother tongue of Danielle Darrieux is"
  coachhook forget edits/ 1-1 3-4
  coachhook rollback edits/ --to 2
  coachhook stats edits/ --json

a line of facts.jsonl:
  {"prompt": "The mother tongue of Danielle Darrieux is", "subject": "Danielle Darrieux", "target_new": "English"}

exit codes: 0 done, 1 not possible (the reason is told), 2 wrong usage or a faulty file of facts, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    said = logging.StreamHandler()
    said.setFormatter(ByLine("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[said])
    try:
        answer = options.act(options)
    except KeyboardInterrupt:
        return _failed(options, INTERRUPTED, "interrupted; whole batches are kept")
    except FactsError as error:
        return _failed(options, USAGE, str(error))
    except (ValueError, KeyError, OSError, ImportError) as error:
        # A KeyError's own text would be quoted.
        return _failed(options, FAILED, str(error.args[0] if isinstance(error, KeyError) else error))
    except (RuntimeError, MemoryError) as error:  # PyTorch's own, above all where memory ran out
        return _failed(options, FAILED, _broken_off(error))
    print(json.dumps(answer) if options.json else options.tell(answer))
    return DONE


def _failed(options: argparse.Namespace, code: int, why: str) -> int:
    if options.json:
        print(json.dumps({"error": why}))
    print(f"coachhook {options.command}: {why}", file=sys.stderr)
    return code


def _broken_off(error: Exception) -> str:
    what = _line_of(error)
    short = isinstance(error, MemoryError) or "memory" in what
    remedy = "; with a smaller --batch-size, or a smaller target_tokens in the hyperparameters, less is needed"
    return f"broken off, whole batches are kept ({what}){remedy if short else ''}"


def _line_of(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


# --- commands --------------------------------------------------------------------------------------------------------


def _edit(options: argparse.Namespace) -> Answer:
    started = time.monotonic()
    facts = read_facts(options.facts)
    with _session_to_edit(options) as session:
        new = outstanding(facts, session.ledger)
        check_facts(options.facts, new, session)
        size = options.batch_size or session.hparams.batch_size
        written: list[str] = []
        with tqdm(total=len(new), desc="facts", unit="fact", disable=options.quiet) as bar:
            for batch in batches(new, size):
                written += edit_facts(options.facts, batch, session).ids
                bar.update(len(batch))
        session.save(options.out)  # the steps become part of the files
        _remember(options.model, Manifest.read(options.out))
        edits = {edit.id: edit for edit in session.ledger}
        return {
            "folder": str(options.out),
            "written": written,
            "skipped": len(facts) - len(new),
            "superseded": [edit.id for edit in session.ledger if edit.by in written],
            "outside_scope": [i for i in written if not edits[i].in_scope],
            "in_force": len(session),
            "step": session.state.step,
            "seconds": round(time.monotonic() - started, 1),
        }


def _tell_edit(answer: Answer) -> str:
    lines = [f"{len(answer['written'])} facts written in {answer['seconds']} s, {answer['skipped']} skipped"]
    if answer["superseded"]:
        lines.append(f"superseded: {', '.join(answer['superseded'])}")
    if answer["outside_scope"]:
        lines.append(
            f"outside the editing scope when edited, and so without effect: {', '.join(answer['outside_scope'])}"
        )
    return "\n".join([*lines, f"{answer['folder']}: {answer['in_force']} edits in force, step {answer['step']}"])


def _inspect(options: argparse.Namespace) -> Answer:
    contents = read(options.folder, use="looking")
    manifest, hparams = contents.manifest, contents.hparams
    return {
        "folder": str(options.folder),
        "format": manifest.format,
        "base_model": manifest.base_model,
        "dtype": manifest.dtype,
        "fingerprint": manifest.fingerprint,
        "versions": manifest.versions,
        "layers": hparams.edited_layers,
        "scope": hparams.scope if hparams.use_hooks else None,
        "in_force": sum(edit.in_force for edit in contents.snapshot.ledger),
        "step": contents.snapshot.step,
        "rollback_from": None if contents.history is None else contents.history.base.step,
        "stored": "dense" if manifest.columns is None else "low rank",
        "files": _sizes(options.folder, contents),
    }


def _tell_inspect(answer: Answer) -> str:
    back = answer["rollback_from"]
    rows = {
        "base model": f"{answer['base_model']} ({answer['dtype']})",
        "edits": f"{answer['in_force']} in force, step {answer['step']}",
        "layers": f"{', '.join(map(str, answer['layers']))} ({answer['stored']}, scope: {answer['scope']})",
        "can go on": "no, memory.safetensors is missing" if back is None else f"yes, and back to step {back}",
        "format": f"{answer['format']}, by {', '.join(f'{k} {v}' for k, v in answer['versions'].items())}",
        "files": "; ".join(f"{name} {size:,} bytes" for name, size in answer["files"].items()) + "; all checked",
    }
    return "\n".join(f"{name + ':':<12}{value}" for name, value in rows.items())


def _show(options: argparse.Namespace) -> Answer:
    wanted = options.fact.lower()
    found = [
        edit
        for edit in read(options.folder, use="looking").snapshot.ledger
        if edit.id == wanted or any(wanted in text.lower() for text in (edit.prompt, edit.target_new))
    ]
    if not found:
        raise ValueError(f"no edit has the id {options.fact!r}, or that text in its prompt or target")
    return {"edits": [edit.to_dict() for edit in found]}


def _tell_show(answer: Answer) -> str:
    return "\n".join(_line(Edit.from_dict(line)) for line in answer["edits"])


def _line(edit: Edit) -> str:
    status = edit.status if edit.by is None else f"{edit.status} by {'step ' * (edit.status == 'forgotten')}{edit.by}"
    outside = "" if edit.in_scope else ", outside the scope when edited"
    return f"{edit.id:<7} {edit.prompt} -> {edit.target_new}  [{status}{outside}; NLL {edit.nll:.3f}, {edit.time}]"


def _stats(options: argparse.Namespace) -> Answer:
    contents = read(options.folder, use="looking")
    ledger = contents.snapshot.ledger
    nll = [edit.nll for edit in ledger if edit.in_force]
    sizes = _sizes(options.folder, contents)
    memory = sum(size for name, size in sizes.items() if name.startswith("memory"))
    return {
        "steps": contents.snapshot.step,
        "edits": dict(Counter(edit.status for edit in ledger)),
        "subjects": len({edit.subject for edit in ledger if edit.in_force}),
        "outside_scope_when_edited": sum(edit.in_force and not edit.in_scope for edit in ledger),
        "mean_nll": sum(nll) / len(nll) if nll else None,
        "worst_nll": max(nll, default=None),
        "threshold": _threshold(contents),
        "bytes_for_answers": sum(sizes.values()) - memory,
        "bytes_of_memory": memory,
    }


def _tell_stats(answer: Answer) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in answer["edits"].items()) or "none"
    rows = [f"{answer['steps']} steps; edits: {counts}"]
    if answer["mean_nll"] is not None:
        rows.append(
            f"in force: {answer['subjects']} subjects, {answer['outside_scope_when_edited']} outside the scope when "
            f"edited; NLL when edited {answer['mean_nll']:.3f} on average, {answer['worst_nll']:.3f} at worst"
        )
    if answer["threshold"] is not None:
        rows.append(f"the scope asks {answer['threshold']:.3f} of a token now")
    rows.append(f"{answer['bytes_for_answers']:,} bytes for answers, {answer['bytes_of_memory']:,} to go on editing")
    return "\n".join(rows)


def _rollback(options: argparse.Namespace) -> Answer:
    with _resumed(options) as session:
        session.rollback(options.to)
        return _state(options, session)


def _forget(options: argparse.Namespace) -> Answer:
    with _resumed(options) as session:
        lines = session.forget(options.ids)
        return _state(options, session) | {"forgotten": [line.id for line in lines]}


def _tell_state(answer: Answer) -> str:
    return f"{answer['folder']}: {answer['in_force']} edits in force, step {answer['step']}"


def _generate(options: argparse.Namespace) -> Answer:
    model, tokenizer = _base_model(options)
    session = load_edits(model, options.folder)

    def said() -> str:
        ids = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        out = model.generate(
            **ids, max_new_tokens=options.max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    edited = said()
    with session.disabled():
        return {"prompt": options.prompt, "edited": edited, "base": said()}


def _tell_generate(answer: Answer) -> str:
    return f"edited: {answer['prompt']}{answer['edited']}\nbase:   {answer['prompt']}{answer['base']}"


# --- helpers ---------------------------------------------------------------------------------------------------------


def _loaded(name: str, dtype: str, device: Any) -> tuple[Any, Any]:
    """A model by shipped name, folder or hub name, in the dtype that its edits are made in, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    if _is_shipped(name):
        name = CoachHooKHparams.from_hparams(name).model_name
    # Not `.to(dtype)`, which would round the rotary frequencies too. The argument's old name is warned of since 4.56.
    argument = "torch_dtype" if __version__.startswith("4.") else "dtype"
    model = AutoModelForCausalLM.from_pretrained(name, **{argument: getattr(torch, dtype)}).eval()
    try:
        model = model.to(device or "cpu")
    except (RuntimeError, AssertionError) as error:  # an assertion where PyTorch comes without CUDA
        raise ValueError(f"device: {device} cannot be used ({_line_of(error)}); name another with --device") from None
    return model, AutoTokenizer.from_pretrained(name)


def _base_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model that the edits of a folder were made on, and its tokenizer."""
    manifest = Manifest.read(options.folder)
    if options.model:
        return _loaded(options.model, manifest.dtype, options.device)
    remembered = _place_of(manifest)
    name = remembered.read_text(encoding="utf-8") if is_kept(remembered) else manifest.base_model
    try:
        return _loaded(name, manifest.dtype, options.device)
    except OSError as error:
        raise ValueError(
            f"{name}: no base model of these edits is to be had by that name ({_line_of(error)}); name it with --model"
        ) from None


def _remember(model: str, manifest: Manifest) -> None:
    """Where this machine has the model of edits; their folder tells nothing but its name."""
    if Path(model).is_dir():
        place = str(Path(model).absolute()).encode()
        with suppress(OSError):  # then `--model` has to be given
            write_whole(_place_of(manifest), lambda stream: stream.write(place))


def _place_of(manifest: Manifest) -> Path:
    return cache_dir() / "places" / manifest.fingerprint


@contextmanager
def _session_to_edit(options: argparse.Namespace) -> Iterator[EditSession]:
    """A new session in the folder `--out`, or with `--resume` the one that is there."""
    going_on = holds_edits(options.out)
    if going_on and not options.resume:
        raise FolderError(
            f"{options.out}: holds edits already; --resume goes on there and skips facts that are in force"
        )
    given = options.hparams or (options.model if _is_shipped(options.model) or not going_on else None)
    hparams = None if given is None else CoachHooKHparams.from_hparams(given)
    if hparams is not None and hparams.model_parallel and not options.device:
        raise ValueError(
            "model_parallel: is true in the hyperparameters, but the command line loads a model onto one device; name "
            "that with --device, or use EditSession with a model that was loaded with device_map"
        )
    usual = "float16" if hparams is not None and hparams.fp16 else "float32"
    dtype = _agreed_dtype(options, hparams) if going_on else options.dtype or usual
    device = options.device or (None if hparams is None else hparams.torch_device())
    place = options.memory_device
    if hparams is not None and (options.hparams or not going_on):
        place = place or hparams.memory_device
    model, tokenizer = _loaded(options.model, dtype, device)
    if going_on:
        session = EditSession.resume(options.out, model, tokenizer, not options.quiet, place)
    else:
        assert hparams is not None
        hparams = replace(hparams, model_name=options.model, session_dir=str(options.out), memory_device=place)
        session = EditSession(model, tokenizer, hparams, progress=not options.quiet)
    try:
        yield session
    finally:
        session.close()


def _agreed_dtype(options: argparse.Namespace, hparams: CoachHooKHparams | None) -> str:
    """That of the edits in `--out`, unless they were made otherwise than --dtype and --hparams say."""
    manifest = Manifest.read(options.out)
    dtype, others = manifest.dtype, []
    if options.hparams and hparams is not None:
        others = differing(hparams_of(options.out, manifest), hparams, FREE | PLACES)
    if options.dtype not in (None, dtype):
        others.append(f"dtype: {dtype} in force, {options.dtype} given")
    if others:
        raise FolderError(
            f"{options.out}: its edits were made otherwise ({'; '.join(others)}); --resume goes on as they were made: "
            "leave --hparams and --dtype away, or name another folder"
        )
    return dtype


def _is_shipped(model: str) -> bool:
    return shipped_hparams(model) is not None and not Path(model).exists()


@contextmanager
def _resumed(options: argparse.Namespace) -> Iterator[EditSession]:
    model, tokenizer = _base_model(options)
    session = EditSession.resume(options.folder, model, tokenizer, not options.quiet, options.memory_device)
    try:
        yield session
    finally:
        session.close()


def _state(options: argparse.Namespace, session: EditSession) -> Answer:
    return {"folder": str(options.folder), "in_force": len(session), "step": session.state.step}


def _threshold(contents: Contents) -> float | None:
    """What the scope asks of a token now (zscore: alpha), where there is one and it asks anything."""
    scope = contents.snapshot.scope  # absent where the memory is: then the gates have it
    told = [scope] if scope else list((contents.gates or {}).values())
    found = [float(of[name].min()) for of in told for name in ("threshold", "alpha") if name in of]
    return min(found) if found and math.isfinite(min(found)) else None


def _sizes(folder: Path, contents: Contents) -> dict[str, int]:
    names = [file.name for file in contents.manifest.files.values()]
    names += [f"steps/{written.name}" for written in contents.trailing]
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    on_model = argparse.ArgumentParser(add_help=False)
    on_model.add_argument("--model", help="base model, by path or name; default: the one the edits were made on")
    on_model.add_argument("--device", help="such as cuda:0; default: cpu")

    on_memory = argparse.ArgumentParser(add_help=False)
    on_memory.add_argument(
        "--memory-device",
        choices=get_args(Place),
        help="where the memories rest between batches; default: as the edits or the hyperparameters have it",
    )

    parser = argparse.ArgumentParser(
        prog="coachhook",
        description="Edit facts in a language model, and look after the edits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(
        name: str, act: Callable[..., Answer], tell: Callable[[Answer], str], what: str, *more: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what, parents=[common, *more])
        made.set_defaults(act=act, tell=tell)
        return made

    edit = command("edit", _edit, _tell_edit, "write the facts of a file into a model, batch after batch", on_memory)
    edit.add_argument("facts", type=Path, help="JSON lines with prompt, subject, target_new")
    edit.add_argument("--model", required=True, help="shipped name of hyperparameters, or with --hparams any model")
    edit.add_argument("--out", type=Path, required=True, help="folder of the session; every batch is kept at once")
    edit.add_argument("--hparams", help="YAML file or shipped name; default: the one of the model's name")
    edit.add_argument("--batch-size", type=_positive, help="facts in a batch; default: that of the hyperparameters")
    edit.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the model; default: float16 where the hyperparameters say fp16, else float32",
    )
    edit.add_argument("--device", help="default: that of the hyperparameters")
    edit.add_argument(
        "--resume",
        action="store_true",
        help="go on in a folder that holds edits, with their hyperparameters and dtype",
    )

    inspect = command("inspect", _inspect, _tell_inspect, "say what a folder holds, and check every byte of it")
    show = command("show", _show, _tell_show, "the ledger's lines of a fact")
    stats = command("stats", _stats, _tell_stats, "figures about the edits of a folder")
    rollback = command(
        "rollback", _rollback, _tell_state, "return to an earlier step, bit for bit", on_model, on_memory
    )
    forget = command("forget", _forget, _tell_state, "take single facts back", on_model, on_memory)
    generate = command("generate", _generate, _tell_generate, "continue a prompt, with and without edits", on_model)
    for one in (inspect, show, stats, rollback, forget, generate):
        one.add_argument("folder", type=Path, metavar="DIR")
    show.add_argument("fact", metavar="FACT", help="id of an edit, or text of its prompt or target")
    rollback.add_argument("--to", type=int, required=True, metavar="STEP", help="0 is the beginning")
    forget.add_argument("ids", nargs="+", metavar="ID", help="ids as `show` tells them")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=_positive, default=20)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)
