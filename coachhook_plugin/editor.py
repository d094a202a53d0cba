"""`CoachHooKEditor`: EasyEdit's `BaseEditor`, with the consecutive protocol that it lacks.

The toolkit's own sequential modes score each edit right after it is made. Here every score "before" is taken first,
then all batches are written, and then everything is scored, so that what later batches do to earlier edits counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from .session import EditResult, EditSession
from .state import SessionState
from .toolkit import import_easyeditor
from .toolkit.apply import session_for

_TOOLKIT: Any = import_easyeditor()

if TYPE_CHECKING:
    BaseEditor = object
else:
    BaseEditor = _TOOLKIT.BaseEditor

NEIGHBORHOOD = "neighborhood"  # name for the single locality prompt of ZsRE and CounterFact records


@dataclass(frozen=True)
class ConsecutiveRun:
    """What `consecutive_edit` found. Scores have the toolkit's shape, so `summary_metrics` reads `metrics`."""

    metrics: list[dict[str, Any]]  # one for each request: case_id, requested_rewrite, time, pre, post
    retention: dict[int, list[dict[str, Any]]]  # after that many edits: `post` of every request edited so far
    batches: list[EditResult]
    start: SessionState  # `session.restore(run.start)` undoes the run


class CoachHooKEditor(BaseEditor):  # type: ignore[misc, unused-ignore]
    """An editor for CoachHooK hyperparameters: everything `BaseEditor` does, and `consecutive_edit`."""

    model: Any
    tok: Any
    hparams: Any
    model_name: str

    @property
    def session(self) -> EditSession:
        """The edit session that lives on the model; made on first use."""
        return EditSession.of(self.model) or session_for(self.model, self.tok, self.hparams)

    def consecutive_edit(
        self,
        requests: Iterable[Mapping[str, Any]],
        batch_size: int | None = None,
        evaluate_at: Sequence[int] = (),
        verbose: bool = True,
    ) -> ConsecutiveRun:
        """Edit batch after batch under one protocol: all scores before, all batches, all scores after.

        The edits stay; an exception keeps the batches that landed. At the end `save_path` gets them.

        Args:
            requests: the toolkit's requests, or a data set of its (`ZsreDataset`, `CounterFactDataset`).
            batch_size: facts in a batch; `hparams.batch_size` where not given.
            evaluate_at: numbers of edits after which everything edited so far is scored as well; each is reached at
                the end of a batch.
            verbose: show progress bars.

        Raises:
            ValueError, KeyError: a request cannot be edited; it is named by its place in the whole list. Or there is
                none, or `batch_size` or `evaluate_at` do not fit, or the hyperparameters differ from those of the
                edits in force. Nothing has been scored or written.
        """
        size = self.hparams.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size is {size}; it must be at least 1")
        given = [toolkit_request(i, item) for i, item in enumerate(requests)]
        if not given:
            raise ValueError("requests is empty; give at least one fact to edit")
        batches = [given[i : i + size] for i in range(0, len(given), size)]
        stops, reachable = set(evaluate_at), {min(i + size, len(given)) for i in range(0, len(given), size)}
        if not stops <= reachable:
            raise ValueError(f"evaluate_at: {sorted(stops - reachable)} is not the end of a batch of {size}")
        session = session_for(self.model, self.tok, self.hparams)
        for number, batch in enumerate(batches):
            session.check(batch, first=number * size)
        with _progress(session, verbose):
            run = self._run(session, batches, stops, {"disable": not verbose, "leave": False})
        if self.hparams.save_path:
            session.save(self.hparams.save_path)
        return run

    def _run(
        self, session: EditSession, batches: list[list[dict[str, Any]]], stops: set[int], bars: dict[str, Any]
    ) -> ConsecutiveRun:
        given = [request for batch in batches for request in batch]
        start = session.state
        metrics: list[dict[str, Any]] = [
            {"case_id": request.get("case_id", i), "requested_rewrite": request, "pre": self._score(request)}
            for i, request in enumerate(tqdm(given, desc="before", **bars))
        ]
        results: list[EditResult] = []
        retention: dict[int, list[dict[str, Any]]] = {}
        done = 0
        for batch in tqdm(batches, desc="batches", **bars):
            results.append(session.edit(batch, first=done))
            for metric in metrics[done : done + len(batch)]:
                metric["time"] = results[-1].seconds
            done += len(batch)
            if done in stops and done < len(given):
                retention[done] = [self._score_after(metric) for metric in metrics[:done]]
        for metric in tqdm(metrics, desc="after", **bars):
            metric["post"] = self._score_after(metric)
        if len(given) in stops:
            retention[len(given)] = [metric["post"] for metric in metrics]
        return ConsecutiveRun(metrics, retention, results, start)

    def _score(self, request: dict[str, Any]) -> dict[str, Any]:
        scores = _TOOLKIT.compute_edit_quality(
            self.model, self.model_name, self.hparams, self.tok, request, self.hparams.device
        )
        return dict(scores)

    def _score_after(self, metric: dict[str, Any]) -> dict[str, Any]:
        """Scores with `<kind>_acc` beside each locality output: the share of tokens that are as in `metric["pre"]`."""
        pre, request = metric["pre"], metric["requested_rewrite"]
        post = self._score(request)
        finalize = getattr(_TOOLKIT, "finalize_locality_metrics", None)
        if finalize is not None:
            finalize({"pre": pre, "post": post}, request, self.hparams, self.model_name)
            return post
        for kind in request["locality"]:  # the release does this in the middle of its methods
            pairs = zip(pre["locality"][f"{kind}_output"], post["locality"][f"{kind}_output"], strict=True)
            post["locality"][f"{kind}_acc"] = [float(np.mean(np.equal(before, after))) for before, after in pairs]
        return post


def toolkit_request(index: int, item: Mapping[str, Any]) -> dict[str, Any]:
    """A request as the toolkit scores it; the single locality prompt of a data set's record becomes an entry."""
    if not isinstance(item, Mapping):
        raise ValueError(f"request {index}: expected prompt, subject and target_new; got {type(item).__name__}")
    request = dict(item)
    request.setdefault("ground_truth", None)
    if request.get("portability") is None:
        request["portability"] = {}
    if request.get("locality") is None:
        request["locality"] = {}
        if request.get("locality_prompt"):
            if request.get("locality_ground_truth") is None:
                raise KeyError(f"request {index}: field 'locality_ground_truth' is missing beside 'locality_prompt'")
            request["locality"][NEIGHBORHOOD] = {
                "prompt": request["locality_prompt"],
                "ground_truth": request["locality_ground_truth"],
            }
    return request


@contextmanager
def _progress(session: EditSession, shown: bool) -> Iterator[None]:
    """The session's own bars as well."""
    before, session.progress = session.progress, session.progress and shown
    try:
        yield
    finally:
        session.progress = before
