"""`python -m evaluation.leaderboard results/<run> ...`: write the leaderboard again from its jobs."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import build, markdown

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("folders", type=Path, nargs="+")
for folder in parser.parse_args().folders:
    rows = build(folder)
    if not rows:
        parser.error(f"{folder} holds no finished job; run python -m evaluation.run run={folder.name} first")
    print(markdown(rows))
