"""`python -m evaluation.leaderboard results/<run> ...`: write the leaderboard again from its jobs."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import against, build, markdown, publish

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("folders", type=Path, nargs="+")
parser.add_argument("--against", metavar="METHOD", help="also write against.md: how far it is ahead of each other one")
parser.add_argument(
    "--publish", metavar="FOLDER", type=Path, help="first copy the finished jobs there, without texts of the data sets"
)
parser.add_argument(
    "--data", metavar="FILE", type=Path, nargs="+", default=[], help="of data sets, for the page of what was published"
)
options = parser.parse_args()
if options.publish and len(options.folders) > 1:
    parser.error("--publish takes the jobs of one folder")
for folder in options.folders:
    try:
        if options.publish and publish(folder, options.publish):
            folder = options.publish
        rows = build(folder, options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not rows:
        parser.error(f"{folder} holds no finished job; run python -m evaluation.run run={folder.name} first")
    print(markdown(rows))
    if options.against:
        try:
            text = against(folder, options.against)
        except ValueError as error:
            parser.error(str(error))
        (folder / "against.md").write_text(text, encoding="utf-8")
        print(text)
