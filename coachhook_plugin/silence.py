"""Who shall see the base model: each thread by itself, as others may go on answering with the edits.

What cannot tell threads apart, such as edits in the weights themselves, is silent for all of them or for none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _OfThread(threading.local):
    silent: bool | None = None  # of the innermost body; None: in no body


class Silence:
    """The bodies that threads are in, with the base model or with the edits; a copy of a model is in none of them."""

    def __init__(self) -> None:
        self.for_all = False  # some thread is silent, and none is in a body with the edits: it may be writing them
        self._here = _OfThread()
        self._lock = threading.Lock()
        self._threads = {True: 0, False: 0}  # whose innermost body is silent, or not

    @property
    def here(self) -> bool:
        """Whether this thread shall see the base model."""
        return self._here.silent is True

    @contextmanager
    def body(self, silent: bool, settle: Callable[[bool], None]) -> Iterator[None]:
        """This thread is `silent` inside the `with` body, or it is not, whatever it is in around that.

        Args:
            settle: is told `for_all` when that may have changed, by one thread at a time.
        """
        around = self._here.silent
        try:
            self._change(around, silent, settle)
            yield
        finally:
            self._change(silent, around, settle)

    def _change(self, before: bool | None, after: bool | None, settle: Callable[[bool], None]) -> None:
        with self._lock:
            for state, more in ((before, -1), (after, 1)):
                if state is not None:
                    self._threads[state] += more
            self._here.silent = after
            self.for_all = self._threads[True] > 0 and not self._threads[False]
            settle(self.for_all)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
