"""WISE and GRACE: a module of their own in the place of one projection, one fact at a time.

They return a shell around the model, and expect the model back; and they answer a row for itself only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...metrics import Asking
from .base import Peer, bytes_of
from .registry import TEMPLATES


class Adapter(Peer):
    """A method whose edits live in an adapter at `inner_params[0]`."""

    writes_one = True
    scratch: tuple[str, ...] = ()  # attributes of the adapter that one pass leaves and nothing builds on

    def _take(self, edited: nn.Module) -> None:
        pass

    def _kept(self) -> list[Any]:
        module = self._adapter()
        return [*super()._kept(), {name: value for name, value in vars(module).items() if name not in self.scratch}]

    def kept_bytes(self) -> int:
        return super().kept_bytes() - bytes_of(next(self._adapter().parameters()))  # the projection's own weight

    def _written_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        module = self._adapter()
        for name in self.scratch:
            vars(module).pop(name, None)
        return {**super().state(), "adapter": copy.deepcopy(module)}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        setattr(*self._adapter_place(), copy.deepcopy(state["adapter"]))

    def _adapter(self) -> nn.Module:
        found: nn.Module = getattr(*self._adapter_place())
        return found

    def _adapter_place(self) -> tuple[nn.Module, str]:
        path = self.hparams.inner_params[0].removesuffix(".weight").replace("[", ".").replace("]", "")
        place, _, name = path.rpartition(".")
        return self.model.get_submodule(place), name


class Wise(Adapter):
    """Its side memory answers for a whole batch or for none of it, by the mean over all tokens.

    While it learns a fact it reads a text that it shall not answer; `loc_prompts` are taken in turn.
    """

    globals_kept = ("wise.WISE:edit_history", "wise.WISE:merge_group_edit_history", f"wise.utils:{TEMPLATES}")
    wants_loc_prompts = True
    templates_lengths = ((5, 5), (10, 5))  # stands in its code
    scratch = ("original_layer_output", "new_weight_layer_output")
    written = 0  # facts so far

    @property
    def asking(self) -> Asking:
        return Asking(alone=True)

    def _hparams(self, *args: Any) -> Any:
        hparams = super()._hparams(*args)
        hparams.sequential_edit = True  # else it forgets its side memory at every call
        return hparams

    def _write(self, requests: list[dict[str, Any]]) -> None:
        if not self.loc_prompts:
            raise ValueError("WISE needs texts that it shall leave alone; give them as `loc_prompts`")
        (request,) = requests
        super()._write([{**request, "loc_prompt": self.loc_prompts[self.written % len(self.loc_prompts)]}])
        self.written += 1

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        return {**super().state(), "written": self.written}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.written = state["written"]


class Grace(Adapter):
    """Looks at one place of the input, which it is told; its `generate` reads without a cache in the toolkit."""

    globals_kept = ()

    @property
    def asking(self) -> Asking:
        return Asking(alone=True, use_cache=False, at=self._look_at)

    def _look_at(self, place: int) -> None:
        module: Any = self._adapter()
        if hasattr(module, "key_id"):
            module.key_id = place
