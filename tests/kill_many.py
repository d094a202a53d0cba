"""Sessions killed at random moments, resumed, killed again: they must end as the one that nobody disturbed.

Usage: python tests/kill_many.py [--kills 200] [--seed 0]

Half of the kills come at a random time, the other half right before or after a random call that brings something to
the disk. Whatever a killed process leaves must load, with the bits that the undisturbed session had at that step. Each
session runs in a fork, so that Python and the libraries start once.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo
from conftest import NAMES, PLACES, SENTENCES

from coachhook_plugin import EditSession, load_edits
from coachhook_plugin.store import holds_edits

STEPS = 14
CALLS = ("fsync", "replace", "unlink", "rename", "rmdir")  # of the module os
CALLS_OF_A_RUN = 170  # about as many as one undisturbed session makes


def started(folder: Path | None, text: Path, seed: int = 0) -> EditSession:
    tokenizer = zoo.tokenizer()
    hparams = zoo.hparams(
        text,
        layers=[1, 2],
        v_num_grad_steps=2,
        scope_budget=0.05,
        context_prefixes=None,
        history_steps=4,
        session_dir=None if folder is None else str(folder),
    )
    model = zoo.model("llama", len(tokenizer), seed=seed)
    if folder is not None and holds_edits(folder):
        return EditSession.resume(folder, model, tokenizer, progress=False)
    return EditSession(model, tokenizer, hparams, progress=False)


def one_step(session: EditSession) -> None:
    """What the session does next, by the number of its steps alone: batches, forgetting, a change of mind."""
    step = session.state.step
    if step in (3, 9):
        session.forget([f"{step}-1"])
    elif step in (6, 11):
        session.edit([{**fact_of(step - 1), "target_new": "Seoul"}])
    else:
        session.edit([fact_of(step), fact_of(step + STEPS)][: 1 + step % 2])


def fact_of(number: int) -> dict[str, str]:
    name, sentence = NAMES[number % len(NAMES)], SENTENCES[number % len(SENTENCES)]
    return {"prompt": sentence.format(name), "subject": name, "target_new": PLACES[number % 3]}


def photograph(session: EditSession) -> Any:
    state = session.state
    tensors = [t for layer in state.layers.values() for t in (layer.delta, layer.memory.matrix)]
    tensors += session._packed(state.scope).values()
    tensors += session.model.buffers()
    lines = [{**edit.to_dict(), "time": ""} for edit in state.ledger]
    return state.step, [t.numpy().tobytes() for t in tensors], lines, session.prefixes


def finish(folder: Path, text: Path) -> None:
    session = started(folder, text)
    while session.state.step < STEPS:
        one_step(session)
    session.detach()


def forked(act: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
        os._exit(0)
    except BaseException as error:
        print(f"the session failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def kill_at_call(number: int, after: bool) -> None:
    """This process dies at the `number`-th call from now on that brings something to the disk."""
    left = [number]

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = call(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return wrapped

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def killed(folder: Path, text: Path, chance: random.Random, seconds: float) -> bool:
    """Let a session run until it is killed; False if it ended before."""
    if chance.random() < 0.5:
        number, after = chance.randint(1, CALLS_OF_A_RUN // 2), chance.random() < 0.5

        def act() -> None:
            kill_at_call(number, after)
            finish(folder, text)

        pid = forked(act)
    else:
        pid = forked(lambda: finish(folder, text))
        time.sleep(chance.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise AssertionError(f"a session could not go on in {sorted(p.name for p in folder.rglob('*'))}")
    return os.WIFSIGNALED(status)


def main(kills: int, seed: int, work: Path) -> None:
    torch.set_num_threads(1)
    os.environ["COACHHOOK_CACHE"] = str(work / "cache")
    text = work / "facts.txt"
    text.write_text(zoo.TEXT, encoding="utf-8")
    session = started(None, text)
    began = time.monotonic()
    expected = [photograph(session)]
    while session.state.step < STEPS:
        one_step(session)
        expected.append(photograph(session))
    seconds = time.monotonic() - began
    chance, done, runs = random.Random(seed), 0, 0
    steps_seen: set[int] = set()
    while done < kills:
        folder, runs = work / f"run-{runs}", runs + 1
        while done < kills and killed(folder, text, chance, seconds):
            done += 1
            if holds_edits(folder):
                found = load_edits(zoo.model("llama", len(zoo.tokenizer())), folder, zoo.tokenizer(), progress=False)
                steps_seen.add(found.state.step)
                assert photograph(found) == expected[found.state.step], f"kill {done}: step {found.state.step} differs"
        pid = forked(lambda folder=folder: finish(folder, text))
        assert os.waitpid(pid, 0)[1] == 0, f"{folder} cannot be resumed"
        found = started(folder, text)
        assert photograph(found) == expected[STEPS], f"{folder} ends differently"
        found.detach()
        left = [path.name for path in folder.rglob(".*") if path.name != ".coachhook.lock"]
        assert not left, f"left behind: {left}"
    print(
        f"{done} kills in {runs} sessions of {STEPS} steps, found at {len(steps_seen)} different steps: all bits equal"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        main(arguments.kills, arguments.seed, Path(folder))
