"""`CoachHooKEditor`: EasyEdit's `BaseEditor`, with the consecutive protocol that it lacks.

The toolkit's own sequential modes score each edit right after it is made. Here every score "before" is taken first,
then all batches are written, and then everything is scored, so that what later batches do to earlier edits counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from .session import EditResult, EditSession, SessionState
from .tokens import parse_requests
from .toolkit import import_easyeditor

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
        return EditSession.of(self.model) or EditSession(self.model, self.tok, replace(self.hparams))

    def consecutive_edit(
        self,
        requests: Iterable[Mapping[str, Any]],
        batch_size: int | None = None,
        evaluate_at: Sequence[int] = (),
        verbose: bool = True,
    ) -> ConsecutiveRun:
        """Edit batch after batch under one protocol: all scores before, all batches, all scores after.

        The edits stay; an exception keeps the batches that landed.

        Args:
            requests: the toolkit's requests, or a data set of its (`ZsreDataset`, `CounterFactDataset`).
            batch_size: facts in a batch; `hparams.batch_size` where not given.
            evaluate_at: numbers of edits after which everything edited so far is scored as well; each is reached at
                the end of a batch.

        Raises:
            ValueError, KeyError: a request cannot be edited; it is named by its place in the whole list.
        """
        size = self.hparams.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size is {size}; it must be at least 1")
        given = [toolkit_request(i, item) for i, item in enumerate(requests)]
        batches = [given[i : i + size] for i in range(0, len(given), size)]
        reachable = {min(i + size, len(given)) for i in range(0, len(given), size)}
        if not set(evaluate_at) <= reachable:
            missed = sorted(set(evaluate_at) - reachable)
            raise ValueError(f"evaluate_at: {missed} is not the end of a batch of {size}")
        for number, batch in enumerate(batches):
            _parse_all(batch, number * size)
        session = self.session
        start = session.state
        bars: dict[str, Any] = {"disable": not verbose, "leave": False}
        metrics: list[dict[str, Any]] = [
            {"case_id": request.get("case_id", i), "requested_rewrite": request, "pre": self._score(request)}
            for i, request in enumerate(tqdm(given, desc="before", **bars))
        ]
        results: list[EditResult] = []
        retention: dict[int, list[dict[str, Any]]] = {}
        for number, batch in enumerate(tqdm(batches, desc="batches", **bars)):
            results.append(session.edit(batch))
            done = number * size + len(batch)
            for metric in metrics[done - len(batch) : done]:
                metric["time"] = results[-1].seconds
            if done in evaluate_at and done < len(given):
                so_far = [self._score(request) for request in given[:done]]
                retention[done] = [_with_locality(m["pre"], post) for m, post in zip(metrics, so_far, strict=False)]
        for metric in tqdm(metrics, desc="after", **bars):
            metric["post"] = _with_locality(metric["pre"], self._score(metric["requested_rewrite"]))
        if len(given) in evaluate_at:
            retention[len(given)] = [metric["post"] for metric in metrics]
        return ConsecutiveRun(metrics, retention, results, start)

    def _score(self, request: dict[str, Any]) -> dict[str, Any]:
        scores = _TOOLKIT.compute_edit_quality(
            self.model, self.model_name, self.hparams, self.tok, request, self.hparams.device
        )
        return dict(scores)


def toolkit_request(index: int, item: Mapping[str, Any]) -> dict[str, Any]:
    """A request as the toolkit scores it; the single locality prompt of a data set's record becomes an entry."""
    request = dict(item)
    request.setdefault("ground_truth", None)
    request.setdefault("portability", {})
    if "locality" not in request:
        request["locality"] = {}
        if request.get("locality_prompt"):
            if request.get("locality_ground_truth") is None:
                raise KeyError(f"request {index}: field 'locality_ground_truth' is missing beside 'locality_prompt'")
            request["locality"][NEIGHBORHOOD] = {
                "prompt": request["locality_prompt"],
                "ground_truth": request["locality_ground_truth"],
            }
    return request


def _parse_all(batch: list[dict[str, Any]], first: int) -> None:
    """Refuse a bad request before anything is scored or written, by its place in the whole list."""
    for offset, request in enumerate(batch):
        try:
            parse_requests([request])
        except (KeyError, ValueError) as error:
            raise type(error)(error.args[0].replace("request 0", f"request {first + offset}", 1)) from None


def _with_locality(pre: dict[str, Any], post: dict[str, Any]) -> dict[str, Any]:
    """`post` with `<kind>_acc` beside each locality output: the share of tokens that are as before."""
    for name, outputs in list(post.get("locality", {}).items()):
        if name.endswith("_output"):
            pairs = zip(pre["locality"][name], outputs, strict=True)
            post["locality"][name.removesuffix("_output") + "_acc"] = [
                float(np.mean(np.equal(before, after))) for before, after in pairs
            ]
    return post
