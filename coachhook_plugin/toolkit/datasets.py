"""EasyEdit's `ZsreDataset` reads the subject of a record and drops it; an editor by subject needs it back."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any


def keep_subjects(dataset: Any) -> None:
    """Let the items of `dataset` (the class `ZsreDataset`) have a `subject` too; other fields stay as they are."""
    initialise = dataset.__init__

    @functools.wraps(initialise)
    def __init__(self: Any, data_dir: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, data_dir, *args, **kwargs)
        raw = json.loads(Path(data_dir).read_text(encoding="utf-8"))
        for item in self._data:
            subject = raw[item["case_id"]].get("subject")  # case_id is the record's place in the file
            if subject is not None:
                item.setdefault("subject", subject)

    dataset.__init__ = __init__
