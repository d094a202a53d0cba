"""This project's method, as a run sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coachhook_plugin import Request
from coachhook_plugin.hparams import CoachHooKHparams
from coachhook_plugin.session import EditSession
from coachhook_plugin.state import SessionState
from coachhook_plugin.tokens import Encoder

from ..data import Record
from ..metrics import Asking


class CoachHooK:
    """CoachHooK, through the toolkit's `BaseEditor`."""

    name = "CoachHooK"
    one_by_one = False
    asking = Asking()

    def __init__(self, hparams: CoachHooKHparams) -> None:
        from coachhook_plugin.editor import CoachHooKEditor

        editor: Any = CoachHooKEditor  # its base class is the toolkit's, without types
        self.editor = editor.from_hparams(hparams)
        self.model: nn.Module = self.editor.model
        self.tokenizer: Any = self.editor.tok

    @property
    def hparams(self) -> CoachHooKHparams:
        """The settings in force."""
        found: CoachHooKHparams = self.editor.hparams
        return found

    @property
    def session(self) -> EditSession:
        """Where the edits live."""
        found: EditSession = self.editor.session
        return found

    def prepare(self) -> None:
        _ = self.session.state, self.session.prefixes

    def edit(self, records: Sequence[Record]) -> None:
        for part in without_contradictions(records):
            self.session.edit([record.request() for record in part])

    def kept_bytes(self) -> int:
        return self.session.kept_bytes()

    def state(self) -> SessionState:
        return self.session.state

    def restore(self, state: SessionState) -> None:
        _ = self.session.state  # the scope is made with it
        self.session.restore(state)

    @torch.no_grad()
    def norms(self, record: Record) -> tuple[dict[int, list[float]], int]:
        """||Delta k|| of each token of the prompt at each edited layer, shallower edits in force; and the index of the
        subject's last token."""
        layers = self.session.state.layers
        pattern = self.hparams.rewrite_module_tmp or "model.layers.{}.mlp.down_proj"
        seen: dict[int, list[float]] = {}

        def note(layer: int) -> Any:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                delta = layers[layer].delta.to(inputs[0].device)  # (d, m)
                seen[layer] = (inputs[0][0].float() @ delta.T).norm(dim=-1).tolist()

            return hook

        handles = [
            self.model.get_submodule(pattern.format(layer)).register_forward_pre_hook(note(layer)) for layer in layers
        ]
        try:
            row = Encoder(self.tokenizer, None).prompt("", Request(record.prompt, record.subject, record.target_new))
            self.model(input_ids=torch.tensor([row.ids], device=next(self.model.parameters()).device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen, row.subject


def without_contradictions(records: Sequence[Record]) -> list[list[Record]]:
    """The batch as it is, or cut where it tells another target for a prompt: written later, that supersedes."""
    parts: list[list[Record]] = []
    told: dict[tuple[str, str], str] = {}
    for record in records:
        asked = (record.prompt, record.subject)
        if not parts or told.get(asked, record.target_new) != record.target_new:
            parts.append([])
            told = {}
        parts[-1].append(record)
        told[asked] = record.target_new
    return parts
