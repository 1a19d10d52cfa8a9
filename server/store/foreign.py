"""Features that others made, and the same packed, as a transaction writes them. No database is needed to make them, so that
processes which only read others' files start in a third of the time.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_core.records import FeatureRecord
from server.packing import ManyActs, ManyDfa, pack_many_acts, pack_many_dfa
from server.store.chunks import cut

EXAMPLES_AT_ONCE = 1000


Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ForeignExamples:
    """A feature's examples as dashboards have them, strongest band first, within it the strongest first: arrays of one example
    after the other. Positions count from the text's first token."""

    band: Ints
    rank: Ints
    dest: Ints
    act: Floats
    """At the destination."""
    keys: list[bytes]
    """What tells their texts from others: `text_key`."""
    fired: Ints
    """[n]: how many of `pos` and `value` are each example's: where the feature fires."""
    pos: Ints
    value: Floats
    attributed: NDArray[np.bool_]
    """[n]: whether the files have DFA for this destination."""
    sources: Ints
    """[n]: how many of `src` and `dfa` are each example's: what a source token gave, heads summed."""
    src: Ints
    dfa: Floats


@dataclass(frozen=True)
class ForeignLabel:
    """An explanation."""

    text: str
    author: str
    method: str


@dataclass(frozen=True)
class ForeignFeature:
    """A feature with its examples."""

    record: FeatureRecord
    examples: ForeignExamples
    texts: dict[bytes, list[str]]
    """By key: texts of its examples, other than those that came with a feature before it."""
    labels: Sequence[ForeignLabel] = ()


@dataclass(frozen=True)
class Chunk:
    """A run of features, their examples packed: what a transaction writes. It may be made in another process."""

    records: list[FeatureRecord]
    labels: list[tuple[int, ForeignLabel]]
    """By feature."""
    texts: dict[bytes, list[str]]
    examples: list[tuple[int, bytes, int, int, int, float, bytes, bytes]]
    """(feature, key of its text, band, rank, destination, activation, `acts`, `dfa`)."""


def text_key(texts: Sequence[str]) -> bytes:
    """What tells a text from others."""
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def chunks(features: Iterable[ForeignFeature]) -> Iterator[Chunk]:
    """A file's features, ready to be written; always the same runs of the same features."""
    for some in cut(features, lambda feature: 1 + len(feature.examples.keys), EXAMPLES_AT_ONCE):
        yield Chunk(
            [feature.record for feature in some],
            [(feature.record.idx, label) for feature in some for label in feature.labels],
            {key: words for feature in some for key, words in feature.texts.items()},
            list(_packed(some)),
        )


def _packed(features: Sequence[ForeignFeature]) -> Iterator[tuple[int, bytes, int, int, int, float, bytes, bytes]]:
    """The examples as they are stored. The files have no bias, so it is what is left of the activation."""
    idx = np.repeat([feature.record.idx for feature in features], [len(feature.examples.keys) for feature in features])
    if not len(idx):
        return

    def joined(name: str) -> Any:
        return np.concatenate([getattr(feature.examples, name) for feature in features])

    band, rank, dest, act, attributed = (joined(name) for name in ("band", "rank", "dest", "act", "attributed"))
    start, sources, dfa = np.zeros_like(dest), joined("sources"), joined("dfa")
    value, gave = joined("value").astype(np.float32).astype(np.float64), dfa.astype(np.float32).astype(np.float64)
    acts = pack_many_acts(ManyActs(start, dest, joined("fired"), joined("pos"), value))
    whose = np.repeat(np.arange(len(dest)), sources)
    total, size = (np.bincount(whose, part, len(dest))[attributed] for part in (dfa, np.abs(dfa)))
    nothing = np.zeros((len(total), 1))
    preact = act[attributed]
    packed = iter(
        pack_many_dfa(
            ManyDfa(
                start[attributed], dest[attributed], sources[attributed], joined("src"), np.zeros(len(dfa), np.int64), gave,
                nothing, nothing, preact, preact - total, size,
            )
        )
        if len(total)
        else ()
    )  # fmt: skip
    keys = [key for feature in features for key in feature.examples.keys]
    of_dfa = (next(packed) if has else b"" for has in attributed.tolist())
    yield from zip(idx.tolist(), keys, band.tolist(), rank.tolist(), dest.tolist(), act.tolist(), acts, of_dfa, strict=True)
