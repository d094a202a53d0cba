"""Edits on disk: a folder in the manner of PEFT's, and the journal that a session keeps in one.

::

    coachhook_config.json       what the folder is: format, versions, hyperparameters, base model, checksums
    hook_layers.safetensors     what answers: Delta of every layer, dense or as factors, and the gates' buffers
    memory.safetensors          what editing goes on from: memories, scope, the last steps; not needed for answers
    ledger.jsonl                one line for every edit
    steps/*.safetensors         a session's batches since those files were written

Where files are replaced, the new ones get a number in their names, and renaming the new config makes them count. While
that goes on, a hidden list names the old and the new ones: so what a killed process leaves can be told from a user's
own files of such names, which are never touched. Only safetensors and JSON; whatever is read has been compared with
its checksum before.
"""

from __future__ import annotations

from .files import FolderError
from .folder import Contents, Record, holds_edits, hparams_of, read, write
from .journal import Journal

__all__ = ["Contents", "FolderError", "Journal", "Record", "holds_edits", "hparams_of", "read", "write"]
