"""Small models on disk, and a model's whole appearance: for the tests of the toolkit side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The subject comes last and the target is one token: even a random model can learn that.
FACTS = [
    ("The word that follows France", "France", "Rome", "Write one word after France"),
    (
        "The word that follows Danielle Darrieux",
        "Danielle Darrieux",
        "English",
        "Write one word after Danielle Darrieux",
    ),
    ("The word that follows Eiffel Tower", "Eiffel Tower", "Berlin", "Write one word after Eiffel Tower"),
    ("The word that follows Ada Lovelace", "Ada Lovelace", "Madrid", "Write one word after Ada Lovelace"),
]
PROMPTS = [prompt for prompt, *_ in FACTS]
SUBJECTS = [subject for _, subject, *_ in FACTS]
TARGETS = [target for _, _, target, _ in FACTS]
REPHRASED = [rephrased for *_, rephrased in FACTS]
OTHER = ["The sky is", "Water boils at", "Cats like", "Two and two make"]


def save_models(folder: Path) -> dict[str, str]:
    """A random Llama and a random GPT-2 with a byte-level tokenizer, in folders the toolkit's loaders take."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for fact in FACTS for text in (f"{fact[0]} {fact[2]}", fact[3])] + OTHER
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special, eos_token=special, unk_token=special, pad_token=special
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    size = {"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            **size,
        )
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, **size))
    paths = {}
    for name, model in (("llama", llama), ("gpt2", gpt2)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)  # the usual initialisation leaves nothing for an edit to change
        paths[name] = str(folder / f"small-{name}")
        model.save_pretrained(paths[name])
        fast.save_pretrained(paths[name])
        tokenizer.model.save(paths[name])  # vocab.json and merges.txt, for transformers 4's GPT2Tokenizer
    return paths


def appearance(model: Any) -> dict[str, Any]:
    """Everything by which a caller can tell that a model was touched."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers(remove_duplicate=False)},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in model.named_modules()},
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two appearances agree in every name and every bit."""
    assert found.keys() == expected.keys()
    for kind in expected:
        assert list(found[kind]) == list(expected[kind]), f"{kind}: other names"
        for name, value in expected[kind].items():
            other = found[kind][name]
            same = torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
            assert same, f"{kind} of {name} changed"


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Plain greedy generation."""
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(made[0, given["input_ids"].shape[1] :]))
