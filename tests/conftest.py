"""What the tests share: an own cache folder, tiny random models, a tokenizer and facts for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from coachhook_plugin import CoachHooKHparams, EditSession
from coachhook_plugin.cache import cache_dir


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


@pytest.fixture
def settings(text: Path) -> Callable[..., CoachHooKHparams]:
    """`settings(alpha=3.0)`: hyperparameters for the tiny models."""
    return lambda **changed: zoo.hparams(text, **changed)


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
