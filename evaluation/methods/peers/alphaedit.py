"""AlphaEdit: writes into the null space of C0, which it keeps in a file."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import Any

import torch

from coachhook_plugin.cache import write_whole

from .base import Peer
from .registry import MODELS

PROJECTION = "null_space_project.pt"


class AlphaEdit(Peer):
    """Its projection is made before the first batch, in the run's own folder, whatever `P_loc` says: the file does not
    tell which model and settings it is of."""

    def _hparams(self, *args: Any) -> Any:
        hparams = super()._hparams(*args)
        projection = self._folder / PROJECTION
        if projection.is_file() and not zipfile.is_zipfile(projection):
            projection.unlink()  # of a process killed while it wrote
        hparams.P_loc = str(projection)
        return hparams

    def prepare(self) -> None:
        if not Path(self.hparams.P_loc).is_file():
            self._project()
        super().prepare()

    def _project(self) -> None:
        """The null space by layer, where its first batch would write it and every later one reads it."""
        module, hparams = importlib.import_module(f"{MODELS}.alphaedit.AlphaEdit_main"), self.hparams
        with self._quiet():
            found = [module.get_project(self.model, self.tokenizer, layer, hparams) for layer in hparams.layers]
        write_whole(Path(hparams.P_loc), lambda stream: torch.save(torch.stack(found), stream))
        module.COV_CACHE.clear()  # nothing reads it again, and a process that goes on has none
