"""Shares with their intervals, and numbers as a study's record keeps them."""

import math
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

Z95 = 1.959964  # two-sided 95 % of the normal distribution


class Record(BaseModel):
    """Base of what a study hands over: frozen, goes to JSON and back, holds no nan and no infinity."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Share(Record):
    """How many of how many, with Wilson's 95 % interval; no value where there are none."""

    hits: int
    n: int
    value: float | None
    low: float | None
    high: float | None


class Bounds(NamedTuple):
    """An interval."""

    low: float
    high: float


def wilson(hits: int, n: int) -> Bounds:
    """Wilson's 95 % interval of a share, for n > 0 (Wilson 1927; Brown, Cai and DasGupta 2001).

    The shares q for which `hits` is within 1.96 of their own standard errors sqrt(q (1 - q) / n): unlike the textbook's interval
    it stays inside 0 to 1 and keeps its promise for few or rare hits. It takes the n for independent. Tokens of one text are
    not quite, so the true interval is somewhat wider.
    """
    share, square = hits / n, Z95**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # At the ends the bounds are 0 and 1, which rounding would miss by a hair.
    return Bounds(0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half)


def share(hits: int, n: int) -> Share:
    """`hits` of `n`."""
    if n == 0:
        return Share(hits=0, n=0, value=None, low=None, high=None)
    low, high = wilson(hits, n)
    return Share(hits=hits, n=n, value=short(hits / n), low=short(low), high=short(high))


def short(value: float) -> float:
    """To six significant digits: more are noise, and take room."""
    return float(f"{value:.6g}")
