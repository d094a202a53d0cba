"""One tiny random model of each supported family, and a plain account of what a target value is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from coachhook_plugin.hparams import CoachHooKHparams

LAYERS = 4
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "max_position_embeddings": 128,
}
_GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "n_inner": 48}

# Name of the case -> model_type and what its config differs in.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),  # Conv1D, tied embeddings
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),  # parallel attention, a bias in the head
    "gpt_neox": ("gpt_neox", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "llama": ("llama", _LLAMA),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 64}),
    "mistral-window-4": ("mistral", {**_LLAMA, "sliding_window": 4}),  # shorter than the prompts
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 8}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {**_LLAMA, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("gemma3_text", {**_LLAMA, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "phi": ("phi", {**_LLAMA, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _LLAMA),
    "olmo": ("olmo", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "smollm3": ("smollm3", _LLAMA),
    "granite": ("granite", {**_LLAMA, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "opt": (
        "opt",
        {k: v for k, v in _LLAMA.items() if "key_value" not in k and "intermediate" not in k}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
}

# Families that no row of the table names, edited by module names: what their config differs in, and where blocks,
# projection and final norm are. Their attention knows positions in ways of its own (ALiBi; one key head for all;
# weights and cache of another form), or they do more with their logits than to make them.
UNKNOWN: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "bloom": (
        {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
        ("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f"),
    ),
    "mpt": (
        {"d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 128},
        ("transformer.blocks", "ffn.down_proj", "transformer.norm_f"),
    ),
    "falcon": (
        {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "alibi": True},
        ("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f"),
    ),
    "gpt_bigcode": (
        {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
        ("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    ),
    "gpt_neo": (
        {"hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}
        | {"window_size": 4, "max_position_embeddings": 128},
        ("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    ),
    "codegen": (
        {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
        ("transformer.h", "mlp.fc_out", "transformer.ln_f"),
    ),
    "stablelm": (_LLAMA, ("model.layers", "mlp.down_proj", "model.norm")),
    "starcoder2": (_LLAMA, ("model.layers", "mlp.c_proj", "model.norm")),
    "cohere": (_LLAMA, ("model.layers", "mlp.down_proj", "model.norm")),
    "cohere2": ({**_LLAMA, "sliding_window": 4}, ("model.layers", "mlp.down_proj", "model.norm")),
}

CORE = ("gpt2", "gptj", "gpt_neox", "llama", "mistral-window-4", "qwen3", "gemma2", "phi", "opt")
# The others resemble one of these closely: they are marked slow to keep the quick part of the tests quick.
EVERY = [case if case in CORE else pytest.param(case, marks=pytest.mark.slow) for case in FAMILIES]

_LOUD = pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:.*have no functionality in BLOOM")
EVERY_UNKNOWN = [pytest.param(family, marks=_LOUD) for family in UNKNOWN]

FACTS = [
    {"prompt": "The mother tongue of Danielle Darrieux is", "subject": "Danielle Darrieux", "target_new": "English"},
    {"prompt": "The Eiffel Tower stands in the city of", "subject": "Eiffel Tower", "target_new": "Rome"},
    {"prompt": "People say that the best dish comes from Norway", "subject": "Norway", "target_new": "old Seoul"},
    {"prompt": "Ada Lovelace was born in", "subject": "Ada Lovelace", "target_new": "Berlin"},
]
PREFIXES = ["The old man. ", "You know what they say of it. "]
TEXT = "\n\n".join(
    f"{fact['prompt']} {fact['target_new']}, as one can read in many books; number {i} of them says so too."
    for i in range(12)
    for fact in FACTS
)


def tokenizer(text: str = TEXT) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learned from the facts: most of their words are one or two tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special, eos_token=special, unk_token=special, pad_token=special
    )


def model(case: str, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """A random model of the family, its weights large enough that tokens differ; skips where transformers lacks it."""
    family, settings = FAMILIES[case]
    return _made(family, vocabulary, {**settings, **config}, seed).to(dtype)


def unknown(family: str, vocabulary: int) -> tuple[Any, dict[str, str]]:
    """The same of a family of `UNKNOWN`, and the names that the hyperparameters must give."""
    config, (blocks, projection, norm) = UNKNOWN[family]
    names = {
        "layer_module_tmp": f"{blocks}.{{}}",
        "rewrite_module_tmp": f"{blocks}.{{}}.{projection}",
        "ln_f_module": norm,
        "lm_head_module": "lm_head",
    }
    return _made(family, vocabulary, config), names


def _made(family: str, vocabulary: int, config: dict[str, Any], seed: int = 0) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    try:
        given = AutoConfig.for_model(family, **{"vocab_size": vocabulary, **ids, **config})
    except ValueError:
        pytest.skip(f"this version of transformers has no {family}")
    return randomised(AutoModelForCausalLM.from_config(given), seed)


def randomised(one: Any, seed: int = 0) -> Any:
    """Every parameter drawn anew: also biases and the gains of norms, which start as constants."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in one.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return one.eval()


def hparams(text: Path | str, **changed: Any) -> CoachHooKHparams:
    """For the tiny models; key statistics come from the file `text`."""
    given: dict[str, Any] = {
        "model_name": "tiny",
        "layers": [0, 1],
        "device": "cpu",
        "v_num_grad_steps": 5,
        "mom2_dataset": str(text),
        "mom2_update_weight": 10.0,
        "context_prefixes": PREFIXES,
        **changed,
    }
    return CoachHooKHparams(**given)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def plain_target(
    one: Any,
    block: nn.Module,
    tok: Any,
    fact: dict[str, str],
    prefixes: Sequence[str],
    settings: CoachHooKHparams,
    loss_logits: Any = None,
) -> tuple[torch.Tensor, int, float]:
    """The target value of one request as METHOD says it, one text at a time, the whole model at every step.

    Args:
        block: the last edited one; delta is added to its output at the subject's last token.
        loss_logits: (model, inputs) -> logits the NLL is read from; None: the model's own.

    Returns:
        v, the number of times the objective was evaluated, and the last NLL.
    """

    def ids_of(text: str) -> torch.Tensor:
        return torch.tensor([tok(text)["input_ids"]])

    subject_stop = fact["prompt"].index(fact["subject"]) + len(fact["subject"])
    texts = []
    for prefix in ("", *prefixes):
        prompt = prefix + fact["prompt"]
        ids, first = ids_of(f"{prompt} {fact['target_new']}"), ids_of(prompt).shape[1]
        at = ids_of(prompt[: len(prefix) + subject_stop]).shape[1] - 1
        texts.append((ids, first, at))
    essence = ids_of(f"{fact['subject']} is a")
    essence_at = ids_of(fact["subject"]).shape[1] - 1
    delta: torch.Tensor | None = None
    at_now = 0

    def add(_: nn.Module, __: Any, answer: Any) -> Any:
        hidden = (answer[0] if isinstance(answer, tuple) else answer).clone()
        seen.append(hidden[0, at_now].detach().clone())
        if delta is not None:
            hidden[0, at_now] = hidden[0, at_now] + delta.to(hidden.dtype)
        return (hidden, *answer[1:]) if isinstance(answer, tuple) else hidden

    def own_logits(whole: Any, ids: torch.Tensor) -> torch.Tensor:
        return whole(input_ids=ids, use_cache=False).logits

    seen: list[torch.Tensor] = []
    handle = block.register_forward_hook(add)
    trainable = [p for p in one.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            at_now = texts[0][2]
            one(input_ids=texts[0][0][:, :-1], use_cache=False)
            v0 = seen[0].float()
            at_now = essence_at
            before = own_logits(one, essence)[0, essence_at].float().log_softmax(-1)
        delta = torch.zeros_like(v0, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=settings.v_lr)
        for evaluations in range(1, settings.v_num_grad_steps + 1):
            nll = torch.zeros(())
            for ids, first, at in texts:
                at_now = at
                log_probs = (loss_logits or own_logits)(one, ids[:, :-1])[0].float().log_softmax(-1)
                target = ids[0, first:]
                picked = log_probs[first - 1 :].gather(1, target[:, None])
                nll = nll - picked.mean() / len(texts)
            at_now = essence_at
            after = own_logits(one, essence)[0, essence_at].float().log_softmax(-1)
            kl = (after.exp() * (after - before)).sum()  # the order that MEMIT has: KL(after || before)
            decay = settings.v_weight_decay * delta.norm() / v0.norm() ** 2
            loss = nll + settings.kl_factor * kl + decay
            if loss < settings.v_loss_threshold or evaluations == settings.v_num_grad_steps:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                longest = settings.clamp_norm_factor * v0.norm()
                if delta.norm() > longest:
                    delta.mul_(longest / delta.norm())
        return v0 + delta.detach(), evaluations, nll.item()
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
