"""What the prompt page shows of an answer: the grid of tokens, the features at one, and one of them taken apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Literal

from sqlalchemy.orm import Session

from server.live import Firing, LiveAttribution, LivePrompt, PromptSae
from server.pages.feature import as_example
from server.rendering import level
from server.store import prompts as store
from server.store.features import FeatureExample, FeatureRow
from server.store.saes import Door

NAMED = {"one": 3, "many": 1}
"""Features that a line of the grid names, with one SAE and with more."""
PAGE = 256
"""Lines of the grid that are shown at once."""
SOURCES = 12
"""Sources of a feature that are shown by head; the others are summed."""


@dataclass(frozen=True)
class Hit:
    """A feature that fires at a token."""

    sae: str
    layer: int
    index: int
    activation: float
    other: float
    """Its activation at the token of the second text that stands beside this one."""
    share: float | None
    """Activation over the largest in the harvest; null without a harvest."""
    other_share: float | None
    row: FeatureRow | None
    """What the harvest and people say of it."""


@dataclass(frozen=True)
class Cell:
    """A token at an SAE."""

    level: int
    """0 to 15: the share of its own maximum that the strongest feature there has; in a comparison, how much differs."""
    said: str


@dataclass(frozen=True)
class GridRow:
    """A token of the grid, or two that stand beside each other."""

    at: int | None
    """Position in the text; null where only the second has a token here."""
    against_at: int | None
    text: str | None
    against_text: str | None
    kind: Literal["same", "other", "begin"]
    """`other` where the two texts' tokens differ; `begin` is the row start, which is no destination."""
    cells: tuple[Cell, ...]
    """By SAE."""
    named: tuple[Hit, ...]
    """The features that matter most there."""
    chosen: bool


@dataclass(frozen=True)
class Source:
    """A source of the feature that is taken apart."""

    position: int
    text: str
    value: float
    heads: tuple[float, ...]


@dataclass(frozen=True)
class Apart:
    """A feature at a token, taken apart."""

    door: Door
    index: int
    row: FeatureRow | None
    example: FeatureExample
    heads: tuple[float, ...]
    """By head, sources summed."""
    sources: tuple[Source, ...]
    """The largest, by size."""
    rest: float
    """All other sources together."""
    largest: float
    """The largest |DFA| of a shown source at a head."""


@dataclass(frozen=True)
class Result:
    """What the page shows of an answer."""

    answer: LivePrompt
    saes: tuple[PromptSae, ...]
    rows: tuple[GridRow, ...]
    """A page of the grid."""
    begin: int
    """Number of its first line."""
    n_rows: int
    """Lines on all pages."""
    chosen: GridRow | None
    """The line that is looked at, on this page or not."""
    hits: tuple[Hit, ...]
    """Every feature at the token that is looked at."""
    apart: Apart | None
    compared: bool


class _Known:
    """What the database says of features, asked once an SAE."""

    def __init__(self, read: Session, doors: Sequence[Door]) -> None:
        self.read, self.doors = read, {door.sae.name: door for door in doors}
        self.most = {door.sae.name: store.strongest_ever(read, door) for door in doors}
        self.rows: dict[str, dict[int, FeatureRow]] = {}

    def share(self, sae: str, index: int, activation: float) -> float | None:
        """Activation over the feature's largest; more than 1 where this text is stronger than all that was harvested."""
        most = self.most[sae]
        if most is None or not most[index]:
            return None
        return activation / float(most[index])

    def tell(self, wanted: Mapping[str, set[int]]) -> None:
        """Ask for the lines of features."""
        for sae, indices in wanted.items():
            self.rows[sae] = {**self.rows.get(sae, {}), **store.told(self.read, self.doors[sae], indices)}

    def hit(self, sae: PromptSae, index: int, activation: float, other: float = 0.0) -> Hit:
        row = self.rows.get(sae.sae, {}).get(index)
        shares = self.share(sae.sae, index, activation), self.share(sae.sae, index, other)
        return Hit(sae.sae, sae.layer, index, activation, other, *shares, row)

    def weight(self, hit: Hit) -> float:
        """By what features of different SAEs are put in order: the share of their own maximum; far behind, those without one."""
        if hit.share is None and hit.other_share is None:
            return 1e-9 * abs(hit.activation - hit.other)
        return abs((hit.share or 0.0) - (hit.other_share or 0.0))


def made(
    read: Session, doors: Sequence[Door], answer: LivePrompt, at: int | None, against_at: int | None, begin: int | None
) -> Result:
    """The answer with what the database knows. `at` and `against_at` are the tokens that are looked at; the grid shows its lines
    from `begin` on, or where None those about the token."""
    known = _Known(read, doors)
    prompt, other = answer.prompt, answer.against
    pairs = [(one, None) for one in range(len(prompt.tokens))] if other is None else aligned(prompt.tokens, other.tokens)
    looked = (at, against_at) if other is not None else (at, None)
    chosen = next((i for i, pair in enumerate(pairs) if pair == looked and looked != (None, None)), None)
    low = min((chosen or 0) if begin is None else begin, len(pairs) - 1) // PAGE * PAGE
    shown = pairs[low : low + PAGE]
    lines = [_hits(known, answer, *pair) for pair in shown]
    here = [] if chosen is None else _hits(known, answer, *pairs[chosen])
    many = len(prompt.saes) > 1
    most = NAMED["many" if many else "one"]
    named = [
        sorted((hit for hit in hits if other is None or _differs(hit)), key=known.weight, reverse=True)[:most] for hits in lines
    ]
    apart = answer.attribution
    wanted: dict[str, set[int]] = {}
    for hit in [*(hit for hits in named for hit in hits), *here]:
        wanted.setdefault(hit.sae, set()).add(hit.index)
    if apart is not None:
        wanted.setdefault(apart.sae, set()).add(apart.index)
    known.tell(wanted)

    def tell(hits: Sequence[Hit]) -> tuple[Hit, ...]:
        return tuple(replace(hit, row=known.rows.get(hit.sae, {}).get(hit.index)) for hit in hits)

    rows = []
    for i, ((mine, theirs), hits) in enumerate(zip(shown, lines, strict=True)):
        text, against = _texts(answer, mine, theirs)
        kind: Literal["same", "other", "begin"] = "same" if other is None or text == against else "other"
        if mine == 0 and theirs in (0, None):
            kind = "begin"
        cells = _cells(known, answer, hits, mine, theirs)
        rows.append(GridRow(mine, theirs, text, against, kind, cells, tell(named[i]), low + i == chosen))
    every = tell(sorted(here, key=known.weight, reverse=True))
    taken = None if apart is None else _apart(known, apart)
    what: Literal["same", "begin"] = "begin" if looked in ((0, None), (0, 0)) else "same"
    at_it = None if chosen is None else GridRow(*pairs[chosen], *_texts(answer, *pairs[chosen]), what, (), (), True)
    return Result(answer, tuple(prompt.saes), tuple(rows), low, len(pairs), at_it, every, taken, other is not None)


def _texts(answer: LivePrompt, at: int | None, against_at: int | None) -> tuple[str | None, str | None]:
    text = None if at is None else answer.prompt.texts[at]
    return text, None if against_at is None or answer.against is None else answer.against.texts[against_at]


def aligned(tokens: Sequence[int], against: Sequence[int]) -> list[tuple[int | None, int | None]]:
    """Positions of two texts side by side: equal runs of tokens beside each other, what was put in another's place as far as it
    goes, and the rest alone."""
    pairs: list[tuple[int | None, int | None]] = []
    for _, low, high, other_low, other_high in SequenceMatcher(None, tokens, against, autojunk=False).get_opcodes():
        for step in range(max(high - low, other_high - other_low)):
            mine, theirs = low + step, other_low + step
            pairs.append((mine if mine < high else None, theirs if theirs < other_high else None))
    return pairs


def _hits(known: _Known, answer: LivePrompt, at: int | None, against_at: int | None) -> list[Hit]:
    """Every feature known to fire at a token, or at one of the two that stand beside each other."""
    found = []
    for which, sae in enumerate(answer.prompt.saes):
        mine = {} if at is None else _by_index(sae.by_position[at])
        theirs = (
            {} if answer.against is None or against_at is None else _by_index(answer.against.saes[which].by_position[against_at])
        )
        found += [
            known.hit(sae, index, mine.get(index, 0.0), theirs.get(index, 0.0)) for index in dict.fromkeys((*mine, *theirs))
        ]
    return found


def _differs(hit: Hit) -> bool:
    """More than two passes of different lengths do by rounding."""
    return abs(hit.activation - hit.other) > 1e-3 * max(hit.activation, hit.other)


def _by_index(firings: Sequence[Firing]) -> dict[int, float]:
    return {one.index: one.activation for one in firings}


def _cells(known: _Known, answer: LivePrompt, hits: Sequence[Hit], at: int | None, against_at: int | None) -> tuple[Cell, ...]:
    cells = []
    for which, sae in enumerate(answer.prompt.saes):
        here = [hit for hit in hits if hit.sae == sae.sae]
        if answer.against is None:
            best = max(here, key=known.weight, default=None)
            n = sae.counts[at] if at is not None else 0
            if best is None:
                cells.append(Cell(0, "nothing fires"))
                continue
            share = "" if best.share is None else f", {100 * best.share:.0f} % of its maximum"
            painted = 1 if best.share is None else level(best.share, 1.0)
            cells.append(Cell(painted, f"{n} fire; {best.index} most, {best.activation:.3g}{share}"))
            continue
        theirs = answer.against.saes[which]
        counts = (sae.counts[at] if at is not None else 0, theirs.counts[against_at] if against_at is not None else 0)
        apart = difference(here)
        cells.append(Cell(level(apart, 1.0), f"{counts[0]} and {counts[1]} fire; {100 * apart:.0f} % differs"))
    return tuple(cells)


def difference(hits: Sequence[Hit]) -> float:
    """How much of what fires differs between two tokens, 0 to 1: 1 - sum of the smaller / sum of the larger, each feature in
    shares of its maximum where that is known (the weighted Jaccard distance)."""
    values = [
        (hit.activation, hit.other) if hit.share is None or hit.other_share is None else (hit.share, hit.other_share)
        for hit in hits
    ]
    larger = sum(map(max, values))
    return 1 - sum(map(min, values)) / larger if larger else 0.0


def _apart(known: _Known, found: LiveAttribution) -> Apart:
    example = as_example(found)
    sums = [sum(row[src] for row in found.dfa) for src in range(found.dest + 1)]
    order = sorted(range(len(sums)), key=lambda src: -abs(sums[src]))
    shown = tuple(Source(src, found.texts[src], sums[src], tuple(row[src] for row in found.dfa)) for src in order[:SOURCES])
    return Apart(
        door=known.doors[found.sae],
        index=found.index,
        row=known.rows.get(found.sae, {}).get(found.index),
        example=example,
        heads=tuple(map(sum, found.dfa)),
        sources=shown,
        rest=sum(sums[src] for src in order[SOURCES:]),
        largest=max((abs(value) for one in shown for value in one.heads), default=0.0),
    )
