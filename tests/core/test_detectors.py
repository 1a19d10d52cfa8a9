"""Detectors of families on sequences made for them: features of known kinds, with noise, beside features made to confuse."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from sae_core.detectors import (
    FAMILIES,
    IN_BANDS,
    MIN_EXAMPLES,
    NONE,
    THRESHOLDS,
    Judged,
    Kept,
    Positions,
    Written,
    beyond_chance,
    family_of,
    judge,
    verdict,
)
from sae_core.families import MEASURES, measure

CONTEXT = 128
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WORDS = [f" word{i}" for i in range(300)]
DAYS = [f" {day}" for day in WEEKDAYS]
VOCABULARY = ["<start>", *WORDS, *DAYS, *map(str, range(20)), *(word.strip().title() for word in WORDS)]
IDS = {text: i for i, text in enumerate(VOCABULARY)}
TEXTS = dict(enumerate(VOCABULARY))
BUCKETS = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127)]
SIZES = np.array([0, *(high - low + 1 for low, high in BUCKETS[1:])])
TOP, WEAK = 12, 12


@dataclass
class Case:
    """An example before it is measured: the row and where the positive DFA lies."""

    tokens: np.ndarray
    dest: int
    signal: dict[int, float] = field(default_factory=dict)
    """Source -> part of the signal."""
    start: float = 0.2
    """Share of all positive DFA that the row start has."""
    logit: float = 0.0
    lowered: bool = False
    """Whether the strongest source's token is what the feature lowers."""


@dataclass
class Maker:
    """Makes one feature's examples; knows what the feature promotes."""

    rng: np.random.Generator
    promoted: list[int]
    x: int
    """The token that the feature is about, where it is about one."""

    def row(self) -> np.ndarray:
        """Words drawn as text has them: a few often, most seldom."""
        rank = np.minimum(self.rng.zipf(1.4, CONTEXT), len(WORDS))
        tokens = rank.astype(np.int64)  # word i has the id i + 1
        tokens[0] = 0
        return tokens

    def place(self, low: int = 45, high: int = 120) -> int:
        return int(self.rng.integers(low, high))

    def noise(self) -> Case:
        """DFA on sources of no kind, at middle distances."""
        dest = self.place()
        return Case(self.row(), dest, {dest - int(gap): 1.0 for gap in self.rng.integers(11, 30, 6)})


def spelled(maker: Maker, word: int) -> int:
    """A word of WORDS as it is or capitalised without its space, a quarter of the time."""
    return IDS[VOCABULARY[word].strip().title()] if maker.rng.random() < 0.25 else word


def induced(maker: Maker, b: int, *, follows: float) -> Case:
    """... A B ... A, read at B, which then comes next with a probability."""
    tokens, dest = maker.row(), maker.place()
    source = dest - int(maker.rng.integers(11, 30))
    a = int(maker.rng.integers(30, 290))
    tokens[source - 1], tokens[source], tokens[dest] = a, b, a
    if maker.rng.random() < follows:
        tokens[dest + 1] = b
    return Case(tokens, dest, {source: 1.0})


def some_word(maker: Maker) -> int:
    return int(maker.rng.integers(30, 290))


def duplicate(maker: Maker, adjacent: float = 0.0) -> Case:
    tokens, dest = maker.row(), maker.place()
    source = dest - (1 if maker.rng.random() < adjacent else int(maker.rng.integers(11, 30)))
    tokens[source] = tokens[dest] = some_word(maker)
    return Case(tokens, dest, {source: 1.0})


def previous(maker: Maker, doubled: float = 0.0) -> Case:
    tokens, dest = maker.row(), maker.place()
    if maker.rng.random() < doubled:
        tokens[dest - 1] = tokens[dest]
    return Case(tokens, dest, {dest - 1: 1.0})


def current(maker: Maker) -> Case:
    dest = maker.place()
    return Case(maker.row(), dest, {dest: 1.0}, lowered=True)


def local(maker: Maker) -> Case:
    dest = maker.place()
    return Case(maker.row(), dest, {dest - gap: 1.0 for gap in (0, 1, 2, 4, 6, 8)}, start=0.1)


def long_range(maker: Maker) -> Case:
    dest = maker.place(80, 127)
    return Case(maker.row(), dest, {int(source): 1.0 for source in maker.rng.integers(1, dest - 40, 10)})


def row_start(maker: Maker) -> Case:
    case = maker.noise()
    case.start = float(maker.rng.uniform(0.7, 0.9))
    return case


def about(maker: Maker, token: int, logit: float, lowered: float = 0.0) -> Case:
    """Reads one and the same token, somewhere, and lowers it with a probability."""
    tokens, dest = maker.row(), maker.place()
    source = dest - int(maker.rng.integers(11, 30))
    tokens[source] = token
    return Case(tokens, dest, {source: 1.0}, logit=logit, lowered=maker.rng.random() < lowered)


def spread_out(maker: Maker) -> Case:
    """Reads many tokens alike, of which one happens to be lowered."""
    case = maker.noise()
    case.lowered = True
    return case


def early(maker: Maker) -> Case:
    dest = int(maker.rng.integers(4, 8))
    return Case(maker.row(), dest, dict.fromkeys(range(1, dest + 1), 1.0))


def one_word(maker: Maker) -> Case:
    """Text that repeats one word; DFA lies everywhere on it."""
    tokens, dest = maker.row(), maker.place()
    tokens[1 : CONTEXT * 3 // 4] = maker.x
    tokens[dest] = maker.x
    return Case(tokens, dest, {int(source): 1.0 for source in maker.rng.integers(max(1, dest - 45), dest + 1, 20)})


def sink(maker: Maker) -> Case:
    case = maker.noise()
    case.start = 0.5
    return case


def alternating(maker: Maker) -> Case:
    """Half of all sources followed an earlier copy; DFA lies on all alike."""
    tokens, dest = maker.row(), 2 * maker.place(30, 50)
    tokens[1:dest:2], tokens[2 : dest + 1 : 2] = maker.x, some_word(maker)
    return Case(tokens, dest, {int(source): 1.0 for source in maker.rng.integers(max(1, dest - 45), dest + 1, 20)})


def weekday(maker: Maker) -> Case:
    return about(maker, IDS[" Tuesday"], 1.0)


@dataclass(frozen=True)
class Kind:
    """Features of one kind, and the families that ought to hold."""

    make: Callable[[Maker], Case]
    families: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    """Families that follow from what was made, but hardly: they count neither way."""
    promoted: Callable[[Maker], list[int]] = lambda maker: [some_word(maker) for _ in range(5)]
    weak: Callable[[Maker], Case] | None = None
    """Examples of the bands; None: half of them as the strongest ones, half noise."""
    firings: Callable[[np.ndarray], np.ndarray] = lambda sizes: sizes * 10
    share: tuple[float, float] = (0.65, 0.95)
    """How much of the DFA is where it was put."""
    odd: float = 0.3
    """At most this share of the strongest examples does something else."""


def kind(make: Callable[[Maker], Case], *families: str, **more: object) -> Kind:
    return Kind(make, frozenset(families), **more)  # type: ignore[arg-type]


NEARBY = frozenset({"local"})
KINDS = {
    "X next by induction": kind(
        lambda m: induced(m, spelled(m, m.x), follows=0.3), "token by induction", "induction", promoted=lambda m: [m.x, 7, 8]
    ),
    "X next by induction, not written yet": kind(lambda m: induced(m, m.x, follows=0.8), "token by induction", "induction"),
    "induction": kind(lambda m: induced(m, some_word(m), follows=0.6), "induction"),
    "previous": kind(previous, "previous token", may=NEARBY),
    "duplicate": kind(duplicate, "duplicate token"),
    "current": kind(current, "current token", may=NEARBY),
    "local": kind(local, "local", share=(0.9, 0.99), odd=0.05),
    "long-range": kind(long_range, "long-range"),
    "row start": kind(row_start, "row start"),
    "suppression": kind(lambda m: about(m, m.x, float(m.rng.normal(-4, 0.5)), lowered=0.95), "suppression"),
    "successor": kind(weekday, "successor", promoted=lambda _: [5, IDS[" Wednesday"], IDS[" Thursday"]]),
    "positional": kind(early, "positional", firings=lambda sizes: np.where(np.arange(8) == 3, 4000, sizes * 2)),
    "noise": kind(Maker.noise),
    # made to confuse
    "one word repeated": kind(one_word),
    "half a row sink": kind(sink),
    "alternating text": kind(alternating),
    "previous, often a copy": kind(lambda m: previous(m, doubled=0.2), "previous token", may=NEARBY),
    "duplicate, often previous": kind(lambda m: duplicate(m, adjacent=0.2), "duplicate token"),
    "all weekdays alike": kind(weekday, promoted=lambda _: [IDS[day] for day in [DAYS[-1], *DAYS[:6]]]),
    "lowers its token by luck": kind(lambda m: about(m, m.x, -3.2)),
    "lowers all common words": kind(lambda m: about(m, int(min(m.rng.zipf(1.4), 300)), -4, lowered=0.2)),
    "lowers one of many": kind(spread_out),
    "fires later and later": kind(Maker.noise, firings=lambda sizes: sizes * np.array([0, 1, 2, 5, 11, 23, 47, 95])),
    "X only where strongest": kind(
        lambda m: induced(m, m.x, follows=0.0), "induction", promoted=lambda m: [m.x, 7, 8], weak=Maker.noise
    ),
}
PER_KIND = 24


@dataclass
class World:
    """All features judged."""

    kinds: list[str]
    judged: Judged
    kept: Kept
    written: Written


def dfa_of(case: Case, rng: np.random.Generator, share: float) -> np.ndarray:
    """[2 heads, src]: head 0 has the signal, with `share` of what is positive beside the row start; the rest lies anywhere.
    Head 1 is negative, which must not count."""
    dfa = np.zeros((2, CONTEXT))
    rest = rng.exponential(1, case.dest) * (rng.random(case.dest) < 0.2)
    dfa[0, 1 : case.dest + 1] += (1 - share) * rest / max(rest.sum(), 1e-9)
    for source, part in case.signal.items():
        dfa[0, source] += share * part / sum(case.signal.values())
    dfa[0] *= 1 - case.start
    dfa[0, 0] = case.start
    dfa[1, 1 : case.dest + 1] = -rng.exponential(0.02, case.dest)
    return dfa


def world(seed: int = 0) -> World:
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    columns: list[tuple[float, ...]] = []
    measures: list[np.ndarray] = []
    promoted: list[list[int]] = []
    firings: list[np.ndarray] = []
    kinds: list[str] = []
    for name, one in KINDS.items():
        for _ in range(PER_KIND):
            maker = Maker(rng, [], int(rng.integers(30, 290)))
            feature, strays = len(kinds), rng.uniform(0, one.odd)
            kinds.append(name)
            promoted.append((one.promoted(maker) * 3)[:5])
            firings.append(one.firings(SIZES))
            for i in range(TOP + WEAK):
                band = 0 if i < TOP else 1
                odd = rng.random() < (strays if band == 0 else 0.5)
                weak = one.make if one.weak is None else one.weak
                case = maker.noise() if odd and one.weak is None else (one.make if band == 0 else weak)(maker)
                dfa = torch.tensor(dfa_of(case, rng, rng.uniform(*one.share)))[None]
                found, _ = measure(dfa, torch.tensor(case.tokens), torch.tensor([case.dest]), 0)
                measures.append(found[0].numpy())
                columns.append((feature, band, case.dest, len(rows), case.logit, case.lowered))
                rows.append(case.tokens)
    *places, logits, lowered = (np.array(column) for column in zip(*columns, strict=True))
    kept = Kept(*places, np.array(rows), np.array(measures), logits, lowered)
    written = Written(np.array(promoted), TEXTS)
    low, high = (np.array(ends) for ends in zip(*BUCKETS, strict=True))
    counts = np.array(firings)
    positions = Positions(low, high, SIZES * 1000, counts, np.where(counts > 0, 2.0, 0.0))
    return World(kinds, judge(kept, written, positions, len(kinds)), kept, written)


@pytest.fixture(scope="module")
def judged() -> World:
    return world()


def test_detectors_find_what_was_made_and_little_else(judged: World) -> None:
    """Floors: up to three examples in ten do something else, and up to a third of the DFA lies anywhere, so that the means lie
    at 0.5 to 0.9 (of `local` above 0.8) and thresholds at 0.5 (0.8): nine features in ten must be found. What is not of a
    family is far below its threshold, so one false verdict in twenty is many."""
    table = ["family              made  said  precision  recall"]
    for i, family in enumerate(FAMILIES):
        counted = np.array([family not in KINDS[name].may for name in judged.kinds])
        made = np.array([family in KINDS[name].families for name in judged.kinds])
        said = judged.judged.holds[:, i] & counted
        precision, recall = (made & said).sum() / max(said.sum(), 1), (made & said).sum() / made.sum()
        table.append(f"{family:18} {made.sum():5} {said.sum():5} {precision:10.3f} {recall:7.3f}")
        assert precision >= 0.95, "\n".join(table)
        assert recall >= 0.9, "\n".join(table)
    sys.stdout.write("\n".join(table))  # shown by -rP


def share_of(judged: World, name: str, family: str) -> float:
    mine = np.array(judged.kinds) == name
    return float(judged.judged.holds[mine, FAMILIES.index(family)].mean())


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("one word repeated", "induction"),
        ("one word repeated", "duplicate token"),
        ("alternating text", "induction"),
        ("alternating text", "duplicate token"),
        ("half a row sink", "row start"),
        ("previous, often a copy", "duplicate token"),
        ("duplicate, often previous", "previous token"),
        ("all weekdays alike", "successor"),
        ("lowers its token by luck", "suppression"),
        ("lowers all common words", "suppression"),
        ("lowers one of many", "suppression"),
        ("current", "suppression"),
        ("fires later and later", "positional"),
        ("X only where strongest", "token by induction"),
        ("induction", "token by induction"),
    ],
)
def test_what_is_made_to_confuse_does_not(judged: World, name: str, family: str) -> None:
    assert share_of(judged, name, family) <= 0.05


def test_the_most_specific_family_that_holds_is_the_features(judged: World) -> None:
    said = {name: [family_of(judged.judged.holds[i]) for i, k in enumerate(judged.kinds) if k == name] for name in KINDS}
    assert said["X next by induction"].count("token by induction") >= 22
    assert said["previous"].count("previous token") >= 22
    assert said["positional"].count("positional") >= 22
    assert said["noise"].count(None) == PER_KIND
    assert family_of([False] * len(FAMILIES)) is None


def test_supporting_examples_are_those_that_show_it(judged: World) -> None:
    column = FAMILIES.index("token by induction")
    feature = judged.kinds.index("X next by induction")
    kept, supports = judged.kept, judged.judged.supports[:, column]
    mine = np.flatnonzero(kept.feature == feature)
    assert supports[mine].sum() >= TOP // 2
    assert supports[mine[kept.band[mine] == 1]].any()
    x = judged.written.texts[int(judged.judged.facts.next_token[feature])].strip().lower()
    for i in mine:
        row, dest = kept.tokens[kept.row[i]], kept.dest[i]
        source = int(kept.source[i])
        shows = VOCABULARY[row[source]].strip().lower() == x and row[source - 1] == row[dest]
        assert supports[i] == shows
    unrelated = judged.kinds.index("noise")
    assert not judged.judged.supports[kept.feature == unrelated].any()


def test_the_next_token_is_the_promoted_one_or_else_the_one_that_is_read(judged: World) -> None:
    facts = judged.judged.facts
    for name in ("X next by induction", "X next by induction, not written yet"):
        for feature in (i for i, k in enumerate(judged.kinds) if k == name):
            if facts.next_token[feature] == NONE:
                continue
            mine = (judged.kept.feature == feature) & judged.judged.supports[:, FAMILIES.index("token by induction")]
            read = judged.kept.token(judged.kept.source)[mine]
            words = {VOCABULARY[token].strip().lower() for token in read.tolist()}
            assert words == {VOCABULARY[facts.next_token[feature]].strip().lower()}
            if name == "X next by induction":
                assert facts.next_token[feature] == judged.written.promoted[feature, 0]


def test_scores_are_between_0_and_1_and_reach_the_threshold_where_a_family_holds(judged: World) -> None:
    scores, holds = judged.judged.scores, judged.judged.holds
    assert np.nanmin(scores) >= 0
    assert np.nanmax(scores) <= 1 + 1e-6
    for i, least in enumerate(THRESHOLDS.values()):
        assert (scores[holds[:, i], i] >= least).all()


def few(n_top: int, n_weak: int = 0, weak_fits: bool = False) -> Judged:
    """One feature with so many examples of " word9 is next by induction"."""
    tokens = np.zeros((1, CONTEXT), dtype=np.int64)
    tokens[0, 1:] = 1 + np.arange(CONTEXT - 1) % 250
    tokens[0, [20, 21, 50]] = IDS[" word3"], IDS[" word9"], IDS[" word3"]
    n = n_top + n_weak
    measures = np.zeros((n, len(MEASURES)), dtype=np.float32)
    measures[:, MEASURES.index("source_gap")] = 29
    measures[:, MEASURES.index("induction")] = 0.9
    dest = np.where(np.arange(n) < n_top, 50, 50 if weak_fits else 80)
    band = (np.arange(n) >= n_top).astype(np.int16)
    kept = Kept(
        np.zeros(n, dtype=np.int64),
        band,
        dest,
        np.zeros(n, dtype=np.int64),
        tokens,
        measures,
        np.zeros(n),
        np.zeros(n, dtype=bool),
    )
    return judge(kept, Written(np.array([[IDS[" word9"]]]), TEXTS), None, 1)


def test_too_few_examples_say_nothing() -> None:
    assert family_of(few(MIN_EXAMPLES).holds[0]) == "token by induction"
    assert family_of(few(MIN_EXAMPLES - 1).holds[0]) is None
    assert family_of(few(0).holds[0]) is None


def test_the_weaker_examples_must_agree_that_a_token_is_next() -> None:
    assert family_of(few(10, 10, weak_fits=True).holds[0]) == "token by induction"
    judged = few(10, 10)
    assert family_of(judged.holds[0]) == "induction"
    assert judged.facts.evidence["next_bands"][0] < IN_BANDS
    assert judged.facts.next_token[0] == NONE


def test_a_share_beyond_chance_is_what_an_even_spread_would_not_give() -> None:
    found = beyond_chance(np.array([0.5, 0.6, 1.0, 0.1, 1.0]), np.array([0.0, 0.2, 0.2, 0.2, 0.3]))
    assert found.tolist() == pytest.approx([0.5, 0.5, 1, 0, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("token by induction", "' board' is next by induction"),
        ("successor", "after ' May' comes ' June'"),
        ("positional", "fires at positions 4 to 7 of the row"),
        ("long-range", "reads far back, 41 tokens on average"),
        ("previous token", "reads the token right before"),
        ("local", "reads the last few tokens, at most 10 back"),
        (None, None),
    ],
)
def test_verdicts_say_it_in_words(family: str | None, words: str | None) -> None:
    assert verdict(family, next_token=" board", pair=(" May", " June"), places=(4, 7), distance=40.6) == words


def test_every_family_has_a_verdict() -> None:
    for family in FAMILIES:
        assert verdict(family, next_token="x", pair=("a", "b"), places=(3, 3), distance=1.0)
