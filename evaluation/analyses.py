"""The pictures of the paper's analyses, from what the sweeps under `evaluation/conf/experiment` left.

    python -m evaluation.run -m experiment=lambda && python -m evaluation.analyses results/lambda

What was swept becomes the horizontal axis. Of a run with `protocol.key_scores=true` (`experiment=key_token`) the
picture is the z-score of the subject's last token against the mean of the prompt's other tokens, by layer and step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .leaderboard import Row, load_jobs, row_of
from .leaderboard.jobs import Job
from .pictures import COLOURS, MARKERS, new_figure, save_figure
from .protocol import METRICS
from .run import slug

# What else a hyperparameter is called, or what is shown of it.
MEANS = {"mom2_update_weight": " (lambda)", "layers": " (number)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="results/<run> of each analysis")
    for folder in parser.parse_args().folders:
        jobs = load_jobs(folder)
        if not jobs:
            parser.error(f"{folder} holds no finished job; run python -m evaluation.run -m experiment={folder.name}")
        scored = [job for job in jobs if has_key_scores(job)]
        if scored:
            found = key_token(scored[0])
            draw_key_token(found, folder / "key-token.png")
            (folder / "key-token.csv").write_text(key_token_table(found), encoding="utf-8")
            print(f"{folder / 'key-token.png'} and .csv: of {scored[0].folder.name}")
        else:
            drawn = draw_sweeps(jobs, folder)
            if not drawn:
                parser.error(f"{folder}: nothing was swept there; its leaderboard shows all of it")
            print("\n".join(str(path) for path in drawn))


def draw_sweeps(jobs: Sequence[Job], folder: Path) -> list[Path]:
    """A picture for each method on each data set of which something was swept."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for job in jobs:
        row = row_of(job)
        parts.setdefault((job.config["method"]["label"], row.title), []).append(row)
    found = {part: (name, rows) for part, rows in parts.items() if (name := swept(rows)) is not None}
    drawn = []
    for (method, title), (name, rows) in found.items():
        stem = name if len(found) == 1 else slug(f"{name} {method} {title}")
        drawn.append(folder / f"{stem}.png")
        draw_sweep(rows, name, f"{method}\n{title}", drawn[-1])
    return drawn


def swept(rows: Sequence[Row]) -> str | None:
    """What differs between the rows: a hyperparameter that was overridden, or the batch size."""
    names = dict.fromkeys(name for row in rows for name in row.overrides)
    for name in names:
        if len({str(row.overrides.get(name)) for row in rows}) > 1:
            return str(name)
    return "batch_size" if len({row.batch_size for row in rows}) > 1 else None


def value_of(row: Row, name: str) -> float | str:
    """Where a row stands on the axis: a number, of a list of layers theirs, or a word."""
    value = row.batch_size if name == "batch_size" else row.overrides[name]
    if isinstance(value, list):
        return float(len(value))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def draw_sweep(rows: Sequence[Row], name: str, title: str, path: Path) -> Any:
    """The scores over what was swept, with intervals, and the perplexity ratio beside them."""
    figure, ((left, right),) = new_figure(1, 2, 4.6, 3.6)
    known = [row for row in rows if name == "batch_size" or name in row.overrides]
    if words := any(isinstance(value_of(row, name), str) for row in known):
        known.sort(key=lambda row: str(value_of(row, name)))
    else:
        known.sort(key=lambda row: float(value_of(row, name)))
    places = [float(i if words else value_of(row, name)) for i, row in enumerate(known)]
    for axis, metrics in ((left, METRICS), (right, ("perplexity_ratio",))):
        for i, metric in enumerate(metrics):
            points = [
                (place, row.metrics[metric])
                for place, row in zip(places, known, strict=True)
                if row.metrics[metric][0] == row.metrics[metric][0]
            ]
            if points:
                x = [at for at, _ in points]
                y = [of[0] for _, of in points]
                below = [max(0.0, of[0] - of[1]) for _, of in points]
                above = [max(0.0, of[2] - of[0]) for _, of in points]
                axis.errorbar(x, y, yerr=[below, above], marker=MARKERS[i], color=COLOURS[i], capsize=2, label=metric)
        axis.set_xlabel(name.replace("_", " ") + MEANS.get(name, ""))
        if not words and min(places) > 0 and max(places) / min(places) > 20:
            axis.set_xscale("log")
            axis.minorticks_off()
        axis.set_xticks(places, [str(value_of(row, name)) if words else f"{value_of(row, name):g}" for row in known])
    left.set(ylim=(-0.02, 1.04), ylabel="share of tokens")
    left.set_title(title, loc="left", fontsize=10)
    right.set_title("Perplexity ratio", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8, ncols=len(METRICS), loc="upper center", bbox_to_anchor=(0.5, -0.16))
    save_figure(figure, path)
    return figure


def has_key_scores(job: Job) -> bool:
    """Whether the norms of the edited prompts' tokens were kept."""
    return job.after is not None and all("norms" in row for row in job.after.rows)


def key_token(job: Job) -> dict[str, dict[int, tuple[float, float]]]:
    """By layer and number of edits: mean z of the subjects' last tokens, and of all other tokens' means."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for edits, phase in sorted(job.steps.items()):
        by_layer: dict[str, list[tuple[float, float]]] = {}
        for row in phase.rows:
            for layer, norms in row["norms"].items():
                scores = z_scores(norms)
                others = [score for place, score in enumerate(scores) if place != row["subject"]]
                if others:
                    by_layer.setdefault(layer, []).append((scores[row["subject"]], statistics.fmean(others)))
        for layer, pairs in by_layer.items():
            key, rest = zip(*pairs, strict=True)
            found.setdefault(layer, {})[edits] = (statistics.fmean(key), statistics.fmean(rest))
    return dict(sorted(found.items(), key=lambda pair: int(pair[0])))


def key_token_table(found: dict[str, dict[int, tuple[float, float]]]) -> str:
    """What `key_token` found, as CSV."""
    lines = [
        f"{layer},{edits},{key:.4f},{others:.4f}"
        for layer, steps in found.items()
        for edits, (key, others) in steps.items()
    ]
    return "\n".join(["layer,edits,z_last_subject_token,z_other_tokens", *lines]) + "\n"


def z_scores(norms: Sequence[float]) -> list[float]:
    """How far each norm stands out from its sequence (paper, Eq. 10); zeros where all are alike."""
    if len(norms) < 2 or not (spread := statistics.stdev(norms)):
        return [0.0] * len(norms)
    middle = statistics.fmean(norms)
    return [(norm - middle) / spread for norm in norms]


def draw_key_token(found: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    """Two lines for each layer: the key token's z, and the mean of the others'."""
    figure, ((axis,),) = new_figure(1, 1, 4.6, 3.6)
    for i, (layer, steps) in enumerate(found.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        axis.plot(list(steps), [key for key, _ in steps.values()], label=f"layer {layer}", **style)
        axis.plot(list(steps), [rest for _, rest in steps.values()], linestyle=":", **style)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="edits so far", ylabel="z of ||Δk||")
    axis.set_title("Subject's last token (solid), mean of the others (dotted)", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
