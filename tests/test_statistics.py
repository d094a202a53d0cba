"""Key statistics: the right numbers, from every source, kept and found again, and refused when they are damaged."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import zoo

from coachhook_plugin import CoachHooKHparams, collection, statistics
from coachhook_plugin.architectures import model_parts, weight_shape
from coachhook_plugin.statistics import (
    KeyStatistics,
    key_statistics,
    load_statistics,
    pre_training_keys,
    save_statistics,
    toolkit_paths,
)
from coachhook_plugin.text import ROWS, SampledText, text_source
from coachhook_plugin.trace import captured, frozen

CPU = torch.device("cpu")
TOKENS = 5000  # more than two batches of the tiny models' text
M = 48  # size of a key


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    facts = [f"{i}: {fact['prompt']} {fact['target_new']}." for i in range(300) for fact in zoo.FACTS]
    path.write_text("\n\n".join(facts), encoding="utf-8")
    return path


@pytest.fixture
def settings(long_text: Path) -> Callable[..., CoachHooKHparams]:
    return lambda **changed: zoo.hparams(long_text, **{"mom2_key_multiple": TOKENS / M, **changed})


@pytest.fixture
def found(tokenizer: Any, settings: Callable[..., Any]) -> Callable[..., dict[int, KeyStatistics]]:
    """`found(model, seed=1)`: its statistics as a session asks for them."""

    def ask(one: Any, **changed: Any) -> dict[int, KeyStatistics]:
        hparams = settings(**changed)
        with frozen(one):
            parts = model_parts(one, hparams)
            return key_statistics(
                one, parts, hparams, lambda: text_source(one, tokenizer, hparams, M, CPU), progress=False
            )

    return ask


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one number, the count of layers, each time text is run through the model."""
    collected: list[int] = []
    real = statistics.collected_sums

    def counting(model: Any, projections: dict[int, Any], *args: Any, **kwargs: Any) -> Any:
        collected.append(len(projections))
        return real(model, projections, *args, **kwargs)

    monkeypatch.setattr(statistics, "collected_sums", counting)
    return collected


def same(one: dict[int, KeyStatistics], other: dict[int, KeyStatistics]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[i].total, other[i].total) and one[i].count == other[i].count for i in one
    )


def some_total(size: int = M, count: int = 100) -> np.ndarray:
    keys = np.random.default_rng(0).normal(size=(count, size))
    return (keys.T @ keys).astype(np.float32)


def write_npz(path: Path, total: Any = None, count: Any = 100, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"mom2.mom2": some_total() if total is None else total, "mom2.count": np.array(count), **more}
    np.savez(path, **arrays)
    return path


# The numbers.


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox", "opt"])
def test_the_sums_are_those_of_all_keys_of_the_text(
    case: str, tiny: Callable[..., Any], found: Callable[..., Any], tokenizer: Any, long_text: Path
) -> None:
    one = tiny(case)
    statistics_of = found(one)
    rows = rows_of(tokenizer, long_text)
    for layer, projection in model_parts(one, zoo.hparams(long_text)).projections.items():
        expected = np.zeros((M, M))
        for row in rows:
            with torch.no_grad(), captured(projection) as seen:
                one(input_ids=torch.tensor([row]))
            keys = seen.input.reshape(-1, M).double().numpy()
            expected += keys.T @ keys
        total, count = statistics_of[layer].total.numpy(), statistics_of[layer].count
        assert count == len(rows) * 128
        assert np.linalg.norm(total - expected) < 1e-5 * np.linalg.norm(expected)
        covariance = statistics_of[layer].covariance().numpy()
        assert np.linalg.norm(covariance - expected / count) < 1e-5 * np.linalg.norm(expected / count)


def rows_of(tokenizer: Any, path: Path, tokens: int = TOKENS) -> list[list[int]]:
    """The text as the models read it: documents, each with its end, in rows of their context, which is 128."""
    documents = path.read_text(encoding="utf-8").split("\n\n")
    ids = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]][:tokens]
    return [ids[i : i + 128] for i in range(0, len(ids) - 127, 128)]


@pytest.mark.parametrize("case", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("count", [1, 200, 2 * 16 * 128 + 5, 100_000])
def test_the_scope_is_calibrated_on_the_first_keys_of_the_text(
    case: str, count: int, tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any, long_text: Path
) -> None:
    one, hparams = tiny(case), settings(layers=[1, 3])
    parts = model_parts(one, hparams)
    with frozen(one):
        found = pre_training_keys(one, parts, 1, text_source(one, tokenizer, hparams, M, CPU), count)
    rows = rows_of(tokenizer, long_text)
    expected: list[torch.Tensor] = []  # one row at a time, only as many as needed
    for row in rows[: -(-count // 128)]:
        with torch.no_grad(), captured(parts.projections[1]) as seen:
            one(input_ids=torch.tensor([row]))
        expected += seen.input.reshape(-1, M)
    assert found.shape == (min(count, len(rows) * 128), M)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.stack(expected[:count]), rtol=1e-3, atol=1e-4)


def test_the_calibration_reads_no_more_text_than_it_needs(
    tiny: Callable[..., Any], settings: Callable[..., Any], tokenizer: Any
) -> None:
    one, passes = tiny().bfloat16(), []
    one.register_forward_pre_hook(lambda *_: passes.append(1))
    with frozen(one):
        text = text_source(one, tokenizer, settings(), M, CPU)
        found = pre_training_keys(one, model_parts(one, settings()), 0, text, ROWS * 128)
    assert len(passes) == 1
    assert found.dtype == torch.float32  # of a model in half precision too
    assert not any(layer.mlp.down_proj._forward_hooks for layer in one.model.layers)


def test_sessions_on_sampled_text_let_the_model_write_it_once(start: Callable[..., Any], empty_cache: Path) -> None:
    """Statistics and calibration share it, and so does the next session."""
    given = {"mom2_dataset": "self", "mom2_key_multiple": 10, "scope": "leverage"}
    first = start(**given)
    _ = first.state
    written = {path.name: path.stat().st_mtime_ns for path in (empty_cache.parent / "text").iterdir()}
    assert written
    for path in empty_cache.iterdir():
        path.unlink()  # so that the statistics are collected again
    again = start(**given)
    _ = again.state
    assert {path.name: path.stat().st_mtime_ns for path in (empty_cache.parent / "text").iterdir()} == written
    assert torch.equal(first._scope._pre_training, again._scope._pre_training)
    one, other = (session.state.layers[1].memory.matrix for session in (first, again))
    assert torch.equal(one, other)


def test_text_sampled_from_the_model_is_enough_and_without_special_tokens(
    tiny: Callable[..., Any], found: Callable[..., Any], tokenizer: Any
) -> None:
    one = tiny()
    for statistic in found(one, mom2_dataset="self", mom2_key_multiple=20).values():
        assert statistic.count >= 20 * M
    source = SampledText(one, tokenizer, 20 * M, 0, CPU, 128)
    texts = torch.cat([source.batch(i) for i in range(source.batches)])
    assert texts.numel() >= 20 * M
    assert not (texts == tokenizer.eos_token_id).any()
    assert len({tuple(row) for row in texts.tolist()}) == len(texts)


def test_statistics_are_of_the_unedited_model(
    start: Callable[..., Any], found: Callable[..., Any], passes: list[int]
) -> None:
    session = start(mom2_update_weight=0.1, alpha=0.5)
    session.edit(zoo.FACTS)
    edited = session.model
    with session.disabled():
        base = found(edited, seed=5)
    session.detach()
    assert same(base, found(edited, seed=5))
    assert passes == [2]  # the second time from the cache: the hooks' buffers do not count as weights


# The cache.


def test_the_second_session_finds_what_the_first_collected(
    tiny: Callable[..., Any], found: Callable[..., Any], passes: list[int]
) -> None:
    first = found(tiny())
    assert same(found(tiny()), first)
    assert passes == [2]
    found(tiny(), layers=[0, 1, 3])
    assert passes == [2, 1]  # the new layer alone


def test_other_weights_other_seeds_and_other_texts_are_not_taken_for_each_other(
    tiny: Callable[..., Any], found: Callable[..., Any], passes: list[int], text: Path
) -> None:
    one = tiny()
    sampled = found(one, mom2_dataset="self")
    assert not same(found(one, mom2_dataset="self", seed=1), sampled)
    read = found(one)
    assert not same(read, sampled)
    assert not same(found(one, mom2_dataset=str(text)), read)
    assert not same(found(one, mom2_key_multiple=50), read)
    with torch.no_grad():
        one.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    assert not same(found(one), read)
    assert passes == [2] * 6
    assert same(found(tiny(), seed=1), read)  # a text is the same for every seed
    assert passes == [2] * 6


def test_text_that_was_edited_is_read_again(
    tiny: Callable[..., Any], found: Callable[..., Any], tmp_path: Path, long_text: Path
) -> None:
    path, one = tmp_path / "own.txt", tiny()
    path.write_text(long_text.read_text(encoding="utf-8"), encoding="utf-8")
    first = found(one, mom2_dataset=str(path))
    path.write_text("Another beginning. " + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert not same(found(one, mom2_dataset=str(path)), first)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "nan", "other shape"])
def test_a_damaged_cache_is_collected_again_and_said_so(
    damage: str,
    tiny: Callable[..., Any],
    found: Callable[..., Any],
    passes: list[int],
    empty_cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = found(tiny())
    files = sorted(empty_cache.glob("*.npz"))
    assert len(files) == 2
    damaged = files[0]
    {
        "truncated": lambda: damaged.write_bytes(damaged.read_bytes()[:-700]),
        "empty": lambda: damaged.write_bytes(b""),
        "text": lambda: damaged.write_text("not found"),
        "nan": lambda: write_npz(damaged, np.full((M, M), np.nan, dtype=np.float32)),
        "other shape": lambda: write_npz(damaged, some_total(M + 1)),
    }[damage]()
    with caplog.at_level(logging.WARNING):
        assert same(found(tiny()), first)
    assert damaged.name in caplog.text
    assert passes == [2, 1]
    assert same(found(tiny()), first)
    assert passes == [2, 1]  # mended for good


# Interruption.


def interrupt(one: Any, at: int) -> Callable[[], int]:
    """Let the model's `at`-th pass end in Ctrl-C; returns the passes begun so far."""
    begun = [0]

    def count(*_: Any) -> None:
        begun[0] += 1
        if begun[0] == at:
            raise KeyboardInterrupt

    one.register_forward_pre_hook(count)
    return lambda: begun[0]


def cut_off(found: Callable[..., Any], one: Any, cache: Path) -> Callable[[], int]:
    """A collection from an empty cache that ends with Ctrl-C in its third pass; returns the passes begun so far."""
    for path in cache.iterdir():
        path.unlink()
    begun = interrupt(one, 3)
    with pytest.raises(KeyboardInterrupt):
        found(one)
    return begun


def test_an_interrupted_collection_goes_on_where_it_was_and_ends_with_the_same_bits(
    tiny: Callable[..., Any],
    found: Callable[..., Any],
    empty_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collection, "CHECKPOINT_SECONDS", -1.0)  # after each batch
    undisturbed, one = found(tiny()), tiny()
    begun = cut_off(found, one, empty_cache)
    assert begun() == 3
    assert [".partial-0-of-1" in path.name for path in empty_cache.iterdir()] == [True]
    projections = model_parts(one, zoo.hparams("-")).projections.values()
    assert not any(projection._forward_pre_hooks for projection in projections)
    assert same(found(one), undisturbed)
    batches = -(-(TOKENS // 128) // ROWS)
    assert batches == 3
    assert begun() == 4  # two batches before, one that was cut off and came again
    assert not list(empty_cache.glob("*.partial*"))


def test_a_damaged_checkpoint_costs_time_and_nothing_else(
    tiny: Callable[..., Any],
    found: Callable[..., Any],
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(collection, "CHECKPOINT_SECONDS", -1.0)
    undisturbed, one = found(tiny()), tiny()
    begun = cut_off(found, one, empty_cache)
    (checkpoint,) = empty_cache.iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        assert same(found(one), undisturbed)
    assert checkpoint.name in caplog.text
    assert begun() == 6


@pytest.mark.parametrize("source", ["file", "self"])
def test_a_cache_that_cannot_be_written_costs_nothing_that_was_collected(
    source: str,
    tiny: Callable[..., Any],
    found: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(collection, "CHECKPOINT_SECONDS", -1.0)  # after each batch
    changed = {} if source == "file" else {"mom2_dataset": source}
    undisturbed = found(tiny(), **changed)
    (tmp_path / "file").touch()
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert same(found(tiny(), **changed), undisturbed)
    (record,) = caplog.records
    assert "COACHHOOK_CACHE" in record.getMessage()


# Text sources.


def test_a_data_set_that_cannot_be_reached_is_replaced_by_the_models_own_text(
    tiny: Callable[..., Any],
    found: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = tiny()
    sampled = found(one, mom2_dataset="self")

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to the hub\nsecond line")

    for module in (None, _datasets(unreachable)):  # no such package; a package and no network
        monkeypatch.setitem(sys.modules, "datasets", module)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert same(found(one, mom2_dataset="wikipedia"), sampled)
        assert "'wikipedia'" in caplog.text
        assert "stats_dir" in caplog.text
    assert "no route to the hub" in caplog.text


def _datasets(load: Callable[..., Any]) -> ModuleType:
    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load
    return module


@pytest.mark.parametrize("limit", [None, 100_000])
def test_no_more_of_a_data_set_is_fetched_than_is_needed(
    limit: int | None, tiny: Callable[..., Any], found: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def load(path: str, config: str | None, **given: Any) -> Iterator[dict[str, str]]:
        assert (path, config) == ("wikimedia/wikipedia", "20231101.en")
        assert given == {"split": "train", "streaming": True}
        for i in range(100_000):
            fetched.append(i)
            if len(fetched) > 2000:
                raise AssertionError("the whole data set is being fetched")
            yield {"text": f"{i}: {zoo.FACTS[i % 4]['prompt']}."}

    monkeypatch.setitem(sys.modules, "datasets", _datasets(load))
    statistics_of = found(tiny(), mom2_dataset="wikipedia", mom2_n_samples=limit)
    assert all(one.count > 0.9 * TOKENS for one in statistics_of.values())
    assert 100 < len(fetched) < 2000


def test_only_the_documents_asked_for_are_read(
    tiny: Callable[..., Any], found: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    documents = [f"{i}: {zoo.FACTS[i % 4]['prompt']}." for i in range(500)]
    rows = ({"text": document} for document in documents)
    monkeypatch.setitem(sys.modules, "datasets", _datasets(lambda *_, **__: rows))
    path = tmp_path / "twenty.txt"
    path.write_text("\n\n".join(documents[:20]), encoding="utf-8")
    by_name = found(tiny(), mom2_dataset="some/set", mom2_n_samples=20)
    assert same(by_name, found(tiny(), mom2_dataset=str(path)))


@pytest.mark.parametrize("content", ["", "\n\n \n\n"])
def test_a_text_file_without_text_is_refused_by_name(
    content: str, tiny: Callable[..., Any], found: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "nothing.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"nothing\.txt' holds no text"):
        found(tiny(), mom2_dataset=str(path))


# The toolkit's files.

NAMINGS = pytest.mark.parametrize("folder", ["small-llama", "some_org_small-llama"], ids=["source", "release"])


@NAMINGS
@pytest.mark.parametrize("samples", [None, 100000])
def test_statistics_made_by_the_toolkit_are_used_under_both_namings(
    folder: str,
    samples: int | None,
    tiny: Callable[..., Any],
    found: Callable[..., Any],
    tmp_path: Path,
    passes: list[int],
) -> None:
    one = tiny()
    one.config._name_or_path = "some/org/small-llama"
    size = "" if samples is None else f"_{samples}"
    for layer in (0, 1):
        file = f"model.layers.{layer}.mlp.down_proj_float64_mom2{size}.npz"
        write_npz(tmp_path / folder / "wikipedia_stats" / file, some_total() * (layer + 1), 50 + layer)
    given = {"stats_dir": str(tmp_path), "mom2_dataset": "wikipedia", "mom2_dtype": "float64"}
    statistics_of = found(one, mom2_n_samples=samples, **given)
    assert not passes
    for layer, statistic in statistics_of.items():
        assert statistic.count == 50 + layer
        # The file holds a sum; C0 is the mean.
        expected = some_total().astype(np.float64) * (layer + 1) / (50 + layer)
        np.testing.assert_allclose(statistic.covariance().numpy(), expected, rtol=1e-6)


def test_layers_that_have_no_file_are_collected(
    tiny: Callable[..., Any],
    found: Callable[..., Any],
    tmp_path: Path,
    passes: list[int],
    settings: Callable[..., Any],
) -> None:
    one = tiny()
    one.config._name_or_path = "small-llama"
    hparams = settings(stats_dir=str(tmp_path))
    write_npz(toolkit_paths(one, model_parts(one, hparams), 1, hparams)[0])
    statistics_of = found(one, stats_dir=str(tmp_path))
    assert passes == [1]
    assert statistics_of[1].count == 100
    assert statistics_of[0].count > 0.9 * TOKENS


def test_a_damaged_toolkit_file_stops_the_edit_instead_of_being_replaced_silently(
    tiny: Callable[..., Any], found: Callable[..., Any], tmp_path: Path, settings: Callable[..., Any]
) -> None:
    one = tiny()
    one.config._name_or_path = "small-llama"
    hparams = settings(stats_dir=str(tmp_path))
    path = write_npz(toolkit_paths(one, model_parts(one, hparams), 1, hparams)[0], some_total(7))
    with pytest.raises(ValueError, match=path.name):
        found(one, stats_dir=str(tmp_path))
    assert path.is_file()  # it is the user's


def _nan(total: np.ndarray) -> np.ndarray:
    total[3, 3] = np.nan
    return total


def _asymmetric(total: np.ndarray) -> np.ndarray:
    total[3, 5] += 100
    return total


def _cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other model": (partial(write_npz, total=some_total(64)), r"\(64, 64\).*48 entries"),
    "vector": (partial(write_npz, total=np.ones(M, dtype=np.float32)), r"\(48,\).*48 entries"),
    "nan": (partial(write_npz, total=_nan(some_total())), "not a sum"),
    "infinite": (partial(write_npz, total=np.full((M, M), np.inf, dtype=np.float32)), "not a sum"),
    "negative": (partial(write_npz, total=-some_total()), "not a sum"),
    "no keys": (partial(write_npz, count=0), "not a sum"),
    "asymmetric": (partial(write_npz, total=_asymmetric(some_total())), "not symmetric"),
    "other arrays": (lambda path: np.savez(path, mean=some_total()), "not a readable"),
    "no numbers": (partial(write_npz, total=np.array([["a"] * M] * M)), "not a readable"),
    "pickled": (partial(write_npz, total=np.array([[None]])), "not a readable"),
    "text": (lambda path: path.write_text("<html>404</html>"), "not a readable"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable"),
    "cut at the end": (lambda path: _cut(write_npz(path), 0.98), "not a readable"),
    "cut in the middle": (lambda path: _cut(write_npz(path), 0.5), "not a readable"),
    "one bit flipped": (lambda path: _flip(write_npz(path)), "not a readable"),
    "a folder": (lambda path: path.mkdir(), "not a readable"),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_holds_no_key_statistics_is_refused_by_name(wrong: str, tmp_path: Path) -> None:
    make, said = WRONG[wrong]
    path = tmp_path / "statistics.npz"
    make(path)
    with pytest.raises(ValueError, match=rf"(?s)statistics\.npz: .*{said}"):
        load_statistics(path, M)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    total = torch.from_numpy(some_total())
    save_statistics(tmp_path / "a" / "b.npz", KeyStatistics(total.double(), 100))
    loaded = load_statistics(tmp_path / "a" / "b.npz", M)
    assert torch.equal(loaded.total, total.double())
    assert loaded.count == 100
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.npz"]


@pytest.fixture(scope="module")
def runningstats() -> ModuleType:
    """The toolkit's own reader; it needs nothing else of the toolkit."""
    toolkit = importlib.util.find_spec("easyeditor")
    if toolkit is None or not toolkit.submodule_search_locations:
        pytest.skip("easyeditor is not installed")
    path = Path(toolkit.submodule_search_locations[0]) / "util" / "runningstats.py"
    spec = importlib.util.spec_from_file_location("toolkit_runningstats", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("samples", [None, 1000])
def test_the_toolkit_reads_our_files_as_its_own(samples: int | None, runningstats: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "ours.npz"
    save_statistics(path, KeyStatistics(torch.from_numpy(some_total()).double(), 100), samples)
    stat = runningstats.CombinedStat(mom2=runningstats.SecondMoment())
    no_text = None  # it would be read if the file did not suit
    given = {} if samples is None else {"sample_size": samples}
    assert list(runningstats.tally(stat, no_text, cache=str(path), quiet=True, **given)) == []
    assert stat.mom2.moment().dtype == torch.float32
    np.testing.assert_allclose(stat.mom2.moment().numpy(), some_total() / 100, rtol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_we_read_the_toolkits_files(precision: torch.dtype, runningstats: ModuleType, tmp_path: Path) -> None:
    keys = torch.randn(300, M, generator=torch.Generator().manual_seed(0)).to(precision)
    stat, path = runningstats.CombinedStat(mom2=runningstats.SecondMoment()), tmp_path / "theirs.npz"
    for batch in keys.split(50):
        stat.add(batch)
    runningstats.save_cached_state(str(path), stat, {"sample_size": 50})
    loaded = load_statistics(path, M)
    assert loaded.count == 300
    expected = (keys.double().T @ keys.double()) / 300
    torch.testing.assert_close(loaded.covariance(), expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_as_wide_as_the_key_and_not_as_the_value(
    tiny: Callable[..., Any], found: Callable[..., Any]
) -> None:
    one = tiny("gpt2")
    for layer, statistic in found(one).items():
        projection = one.transformer.h[layer].mlp.c_proj
        assert statistic.total.shape == (M, M) == (weight_shape(projection)[1],) * 2
