"""What commands print: lines, tables, JSON. A console is made when this is imported, and asks its terminal then."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Column, Table

_console = Console(highlight=False)


def console() -> Console:
    """Where commands say what they say, now."""
    return _console


@contextmanager
def aside(apart: bool) -> Iterator[None]:
    """Say everything on stderr meanwhile, so that stdout holds nothing but what was asked for."""
    global _console
    stdout = _console
    _console = Console(stderr=True, highlight=False) if apart else stdout
    try:
        yield
    finally:
        _console = stdout


def say(text: str) -> None:
    """A line."""
    _console.print(text, soft_wrap=True, markup=False)


def say_json(found: object) -> None:
    """One JSON object, and nothing else."""
    _console.print_json(json.dumps(found))


def table(heads: tuple[str, ...] | None, rows: Sequence[tuple[str, ...]], empty: str) -> None:
    """Rows under their heads, or without any; `empty` where there are none."""
    if not rows:
        say(empty)
        return
    columns = [Column(head, overflow="fold") for head in heads or ("", "")]
    drawn = Table(*columns, box=None, show_header=heads is not None, padding=(0, 2, 0, 0))
    for row in rows:
        drawn.add_row(*row)
    _console.print(drawn)
