"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The lines of a table, without an end of the last one; the first `left` columns are text, the others numbers."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    first, *others = (f"| {' | '.join(line)} |" for line in (head, *rows))
    return "\n".join([first, rule, *others])
