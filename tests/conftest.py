"""What the tests share: an own cache folder, tiny random models, a tokenizer and facts for them."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import settings as hypothesis_settings

from coachhook_plugin import CoachHooKHparams, EditSession
from coachhook_plugin.cache import cache_dir

# The same examples in every run, however slow the machine.
hypothesis_settings.register_profile("plugin", derandomize=True, deadline=None)
hypothesis_settings.load_profile("plugin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those with many: begun last, they would keep a process of `make test`
    waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is read from or written to the user's cache, except the converted real model, which takes a while."""
    before, users = os.environ.get("COACHHOOK_CACHE"), cache_dir().resolve() / "models"
    folder = tmp_path_factory.mktemp("cache")
    users.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(users, target_is_directory=True)
    os.environ["COACHHOOK_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["COACHHOOK_CACHE"]
    else:
        os.environ["COACHHOOK_CACHE"] = before


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models gain nothing from more threads, and lose much where another process wants the cores too."""
    threads = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE with `pad_token` = `eos_token`, as GPT-2 is usually set up."""
    return zoo.tokenizer()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file for the key statistics."""
    path = tmp_path_factory.mktemp("text") / "facts.txt"
    path.write_text(zoo.TEXT, encoding="utf-8")
    return path


@pytest.fixture
def tiny(tokenizer: Any) -> Callable[..., Any]:
    """`tiny("llama")`: a new random model of a family, the same bits each time."""
    return lambda case="llama", **changed: zoo.model(case, len(tokenizer), **changed)


@pytest.fixture(scope="session")
def settings(text: Path) -> Callable[..., CoachHooKHparams]:
    """`settings(alpha=3.0)`: hyperparameters for the tiny models.

    Their text holds the facts over and over, so that a usual budget would be spent on the edited subjects' own tokens.
    """
    given = {"layers": [1, 2], "v_num_grad_steps": 4, "scope_budget": 0.05}
    return lambda **changed: zoo.hparams(text, **{**given, **changed})


@pytest.fixture
def start(tiny: Callable[..., Any], tokenizer: Any, settings: Callable[..., Any]) -> Callable[..., EditSession]:
    """`start("gpt2", alpha=3.0)`: a session on a new tiny model."""

    def made(case: str = "llama", dtype: torch.dtype = torch.float32, **changed: Any) -> EditSession:
        return EditSession(tiny(case, dtype=dtype), tokenizer, settings(**changed), progress=False)

    return made


@pytest.fixture
def facts() -> list[dict[str, str]]:
    """Prompts of different lengths, one of them too short to reach the usual alpha."""
    return [dict(fact) for fact in zoo.FACTS]


NAMES = ["Danielle Darrieux", "Ada Lovelace", "Norway", "Eiffel Tower", "Darrieux", "Lovelace", "Ada Norway", "Tower"]
PLACES = ["Rome", "English", "Berlin", "Seoul"]
SENTENCES = [
    "The mother tongue of the old man is that of {}",
    "People say that the best dish comes from {}",
    "In the city as one can read in many books of {}",
]


def lessons(shift: int) -> list[dict[str, str]]:
    """What the taught models know (shift 0), or the same prompts with other answers."""
    return [
        {"prompt": sentence.format(name), "subject": name, "target_new": PLACES[(i + j + shift) % 4]}
        for i, name in enumerate(NAMES)
        for j, sentence in enumerate(SENTENCES)
    ]


@pytest.fixture(scope="session")
def taught_models(tokenizer: Any) -> dict[str, Any]:
    """Tiny models trained on the lessons: they know something, so that an edit can change it."""
    rows = [tokenizer(f"{fact['prompt']} {fact['target_new']}.")["input_ids"] for fact in lessons(0)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = torch.tensor(row), 1
    models = {}
    for case in ("llama", "gpt2", "mistral-window-4"):
        model = zoo.model(case, len(tokenizer))
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(100):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            adam.zero_grad()
            loss.backward()
            adam.step()
        adam.zero_grad()
        models[case] = model.eval()
    return models


@pytest.fixture(scope="session")
def taught(taught_models: dict[str, Any], tokenizer: Any, settings: Callable[..., Any]) -> Callable[..., EditSession]:
    """`taught("gpt2")`: a session on a copy of a taught model, where edits have room and the scope is wide."""

    def made(case: str, dtype: torch.dtype = torch.float32, **changed: Any) -> EditSession:
        room = {"v_num_grad_steps": 25, "clamp_norm_factor": 4.0, "v_weight_decay": 0.01, "mom2_update_weight": 0.1}
        model = copy.deepcopy(taught_models[case]).to(dtype)
        return EditSession(
            model, tokenizer, settings(**room, **{"layers": [0, 1], "alpha": 0.3, **changed}), progress=False
        )

    return made
