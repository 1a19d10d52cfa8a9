"""Runs of items, each of which a transaction writes."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def cut(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Runs of items that hold `most` or just more; always the same runs of the same items, so that their marks mean the same."""
    chunk: list[T] = []
    held = 0
    for item in items:
        chunk.append(item)
        held += size(item)
        if held >= most:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
