"""What kind of work a feature does: detectors of families, their scores, and the examples that support them.

A detector gives every kept example a number from 0 (speaks against the family) to 1, or nan where it cannot tell. A feature's
score is the mean over those of its strongest examples (band 0) that can; the family holds where the score reaches the
detector's threshold and at least MIN_EXAMPLES could tell. An example whose own number reaches the threshold supports it,
whichever band it is from. So a score is about the strongest firings, a sample, and the examples say what it rests on. Several
families may hold; the feature's family is the most specific one, in the order of FAMILIES. Most features fit none.

Kissane et al. 2024 (arXiv 2406.17759) name the families; where the exact rule of the paper is not known it is made here,
with its reason. `s` below is an example's number, `DFA` its positive DFA with row starts left out, heads summed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_core.families import MEASURES, NEAR, average
from sae_core.token_texts import plain, promoted_successor

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]
Marks = NDArray[np.bool_]

MIN_EXAMPLES = 5
"""With fewer strongest examples nothing is said."""
IN_BANDS = 0.2
"""Share of the weaker examples that must agree with "{token} is next by induction"."""
MOST_BY_CHANCE = 0.25
"""Share of sources of a kind from which on an example cannot tell whether they are read for being so."""
EXAMPLES_AT_ONCE = 4096
NONE = -1


@dataclass(frozen=True)
class Kept:
    """Every example that a harvest kept, as columns [n], and the rows they are in."""

    feature: Ints
    band: Ints
    dest: Ints
    row: Ints
    """Index into `tokens`."""
    tokens: Ints
    """[U, context]; the first token of a row is the row start."""
    measures: Floats
    """[n, len(MEASURES)]"""
    source_logit: Floats
    """Standard deviations (over the vocabulary) by which the feature's decoder lifts the token of the strongest source."""
    source_lowered: Marks
    """Whether that token is what the decoder lowers, of the vocabulary and in the row (`attribution.lowered_in_row`)."""

    def __len__(self) -> int:
        return len(self.feature)

    def measure(self, name: str) -> Floats:
        """One of MEASURES, [n]."""
        column: Floats = self.measures[:, MEASURES.index(name)]
        return column

    @property
    def source(self) -> Ints:
        """Position of each example's strongest source."""
        gap = np.nan_to_num(self.measure("source_gap")).astype(np.int64)
        found: Ints = np.maximum(self.dest - gap, 0)
        return found

    def token(self, position: Ints) -> Ints:
        """Each example's token at `position` [n]; NONE outside the row."""
        inside = (position >= 0) & (position < self.tokens.shape[1])
        found: Ints = np.where(inside, self.tokens[self.row, np.where(inside, position, 0)], NONE)
        return found


@dataclass(frozen=True)
class Positions:
    """Where in the row features fire, by buckets of positions."""

    low: Ints
    """[B] First position of a bucket."""
    high: Ints
    """[B] Last one."""
    tokens: Ints
    """[B] Tokens swept there."""
    firings: Ints
    """[F, B]"""
    mean: Floats
    """[F, B] mean activation of these firings, 0 where there are none."""


@dataclass(frozen=True)
class Written:
    """What features promote, and what tokens say."""

    promoted: Ints
    """[F, k] token ids, strongest first; rows of features without any are NONE."""
    texts: Mapping[int, str]
    """Of every token in the rows and in `promoted`."""


@dataclass
class Facts:
    """What verdicts name, beside scores."""

    next_token: Ints
    """[F] the token that is next by induction, or NONE."""
    pair: Ints
    """[F, 2] a source token and the promoted one that comes after it, or NONE."""
    places: Ints
    """[F, 2] first and last position of the buckets where a positional feature is at home, or NONE."""
    evidence: dict[str, Floats] = field(default_factory=dict)
    """[F] each: numbers behind the verdicts that are no mean of a measure."""


@dataclass(frozen=True)
class Judged:
    """Which families hold, and why."""

    scores: Floats
    """[F, len(FAMILIES)], nan where nothing can be said."""
    holds: Marks
    """[F, len(FAMILIES)]"""
    supports: Marks
    """[n, len(FAMILIES)]: the example's own number reaches the threshold of a family that holds."""
    facts: Facts


# ---- detectors: an example's number, [n] in 0 .. 1, nan where it cannot tell ----


def beyond_chance(share: Floats, chance: Floats) -> Floats:
    """(share - chance) / (1 - chance), at least 0: what is left of a share when every source is thought to give the same.

    `chance` is the share of all sources that are of the kind. Text that repeats itself makes almost every source a
    "previous occurrence": above MOST_BY_CHANCE an example cannot tell, since any feature's DFA lies on some.
    """
    left: Floats = np.maximum(share - chance, 0) / np.maximum(1 - chance, 1e-6)
    return np.where(chance > MOST_BY_CHANCE, np.nan, left)


def row_start(kept: Kept) -> Floats:
    """s = share of all positive DFA that row starts give. Threshold 0.6: attention rests there by default, so more than a
    bare majority is asked before the rest of the DFA is thought to say little."""
    return kept.measure("row_start")


def induction(kept: Kept) -> Floats:
    """s = share of DFA on tokens that followed an earlier copy of the destination's token, beyond chance. Threshold 0.5: more
    than all other sources together. On SmolLM2's layer 17 features of its induction heads lie at 0.5 to 0.9, of others below
    0.35; what lies between is half of it by eye, induction among other things. Where a token comes twice in a row ("A A B"),
    its second copy is both what followed an earlier copy and a copy: both families may hold, and induction is said first.
    """
    return beyond_chance(kept.measure("induction"), kept.measure("induction_chance"))


def duplicate(kept: Kept) -> Floats:
    """s = share of DFA on earlier copies of the destination's token, beyond chance. Threshold 0.5: more than all other
    sources together."""
    return beyond_chance(kept.measure("duplicate"), kept.measure("duplicate_chance"))


def current(kept: Kept) -> Floats:
    """s = share of DFA on the destination itself. Threshold 0.5, as for all single sources."""
    return kept.measure("current")


def previous(kept: Kept) -> Floats:
    """s = share of DFA on the token right before the destination. Threshold 0.5."""
    return kept.measure("previous")


def local(kept: Kept) -> Floats:
    """s = share of DFA within NEAR = 10 tokens; unknown for destinations so early that little else is possible. Threshold
    0.8: at 0.5 half of all features would be local, for most attention is."""
    return kept.measure("near")


def long_range(kept: Kept) -> Floats:
    """s = share of DFA beyond FAR = 32 tokens; unknown for destinations at most 2 FAR into the row. Threshold 0.5, and the
    mean distance over all examples must be 20 or more: the late ones alone could be a few of many."""
    return kept.measure("far")


def suppression(kept: Kept) -> Floats:
    """s = 1 where one earlier source gives a third of the DFA or more, so that there is "the" source, and the decoder lowers
    that very token: as one of the 10 tokens of the vocabulary that it lowers most, and more than any other token of the row
    so far; else 0. Threshold 0.5 of the examples.

    McDougall et al. 2023 count copy suppression so: head 10.7 of GPT-2 Small has the token it attends to among the 10 it lowers
    most. A feature that always reads the same token has one draw from its own logits: 10 of 49,152 is luck for 1 such feature
    in 5,000. (At 3 standard deviations, the rule before, it was 1 in 700, which is what was found.) The row is asked since a
    decoder may lower all common words: whatever such a feature reads, it lowers, but other words beside it more. The source
    is before the destination: that the token which stands there does not come next says no more than that words are seldom
    said twice.
    """
    earlier = kept.measure("source_gap") >= 1
    return ((kept.measure("top_share") >= 1 / 3) & earlier & kept.source_lowered).astype(np.float32)


def successor(kept: Kept, written: Written) -> tuple[Floats, Ints]:
    """s = 1 where the strongest source gives a third of the DFA or more, is a thing said in order (numbers, weekdays, months,
    letters, Roman numerals, ordinals), and its successor is the first of that sequence among the promoted tokens; else 0.
    And the promoted token that comes after the source, or NONE. Threshold 0.5 of the examples.

    "The first of its sequence" tells what comes next from what is alike: a direction that promotes all weekdays promotes
    the source's own as well. The decoder is one direction, so a successor feature knows few sources.
    """
    sources = kept.token(kept.source)
    strong = kept.measure("top_share") >= 1 / 3
    found = np.full(len(kept), NONE, dtype=np.int64)
    known: dict[tuple[int, int], int] = {}
    texts = {feature: [written.texts[i] for i in ids] for feature, ids in enumerate(written.promoted.tolist()) if NONE not in ids}
    for example in np.flatnonzero(strong).tolist():
        feature, token = int(kept.feature[example]), int(sources[example])
        if (feature, token) not in known:
            rank = promoted_successor(written.texts[token], texts.get(feature, []))
            known[feature, token] = NONE if rank is None else int(written.promoted[feature, rank])
        found[example] = known[feature, token]
    return (found != NONE).astype(np.float32), found


@dataclass(frozen=True)
class NextToken:
    """What `next_by_induction` found."""

    number: Floats
    """[n] s."""
    token: Ints
    """[F]: X, as an id; NONE where there is no candidate."""
    in_bands: Floats
    """[F]: share of the weaker examples to which the proxy applies; nan without any."""
    follows: Floats
    """[F]: share of the strongest examples whose next token in the text is X."""
    lifted: Floats
    """[F]: mean `source_logit` of the supporting strongest examples."""


def next_by_induction(kept: Kept, written: Written, n_features: int) -> NextToken:
    """ "{X} is next by induction": s = 1 where the strongest source is X and the token before it is the destination's; else 0.
    Tokens are compared as words (`token_texts.plain`), as Kissane et al. do. Threshold 0.5 of the strongest examples, and the
    proxy must apply to IN_BANDS of the weaker ones: the destination's token occurred before, followed by X. (s = 1 implies the
    proxy.) By chance the proxy applies to 1 example in 800 on the demo's text, so either threshold is far from luck; below
    a half it would be one of several things that the feature does.

    X is the token that the feature promotes most, as in the paper. Where that does not reach the threshold, the token that
    most of the strongest examples read by induction is tried: half way up a model the copied token need not be written
    towards the output yet. Then "is next" is asked of the text instead: in half of the strongest examples X must be the
    token that really comes next, or the decoder must lift it by 3 standard deviations (`suppression` says why 3).
    """
    n_words, word = _words(written.texts)
    first = written.promoted[:, 0] if written.promoted.shape[1] else np.full(n_features, NONE)
    source, top = kept.source, kept.band == 0
    own, read, before = (word[kept.token(at)] for at in (kept.dest, source, source - 1))
    # Index NONE (-1) of `word` holds NONE: what lies outside the row is like nothing.
    induced = (before == own) & (source < kept.dest) & (before != NONE)
    plenty = np.isnan(induction(kept))  # text that repeats itself: the example cannot tell
    induced &= ~plenty
    agreed, agreed_token = _mode(kept.feature, read, kept.token(source), induced & top, n_features, n_words)
    follows = word[kept.token(kept.dest + 1)]

    def candidate(x: Ints) -> tuple[Floats, Floats, Floats, Floats]:
        mine = x[kept.feature]
        number = (induced & (read == mine)).astype(np.float32)
        score, real = (_mean(values, kept.feature, top, n_features) for values in (number, (follows == mine).astype(np.float32)))
        lifted = _mean(kept.source_logit, kept.feature, top & (number > 0), n_features)
        return number, score, real, lifted

    by_logit, by_source = candidate(word[first]), candidate(agreed)
    real_or_lifted = (np.nan_to_num(by_source[2]) >= 0.5) | (np.nan_to_num(by_source[3], nan=-np.inf) >= 3)
    take = ~(np.nan_to_num(by_logit[1]) >= THRESHOLDS["token by induction"]) & real_or_lifted
    number, _, real, lifted = (
        np.where(take[kept.feature] if i == 0 else take, by_source[i], by_logit[i]) for i in range(len(by_logit))
    )
    chosen = np.where(take, agreed, word[first])
    applies = _proxy(kept, word, chosen)
    return NextToken(
        number=number.astype(np.float32),
        token=np.where(take, agreed_token, first),
        in_bands=_mean(applies.astype(np.float32), kept.feature, ~top, n_features),
        follows=real,
        lifted=lifted,
    )


def _words(texts: Mapping[int, str]) -> tuple[int, Ints]:
    """How many words there are, and each token's, by id; the last entry, which NONE finds, is NONE."""
    numbers: dict[str, int] = {}
    word = np.full(max(texts, default=0) + 2, NONE, dtype=np.int64)
    for token, text in texts.items():
        word[token] = numbers.setdefault(plain(text), len(numbers))
    return len(numbers), word


def _mode(feature: Ints, word: Ints, token: Ints, where: Marks, n_features: int, n_words: int) -> tuple[Ints, Ints]:
    """The word that most of a feature's examples `where` have, and its most frequent token: [F] each, NONE without any. Ties
    go to the lower id."""
    found = np.full(n_features, NONE, dtype=np.int64)
    pairs, count = np.unique(feature[where].astype(np.int64) * n_words + word[where], return_counts=True)
    order = np.lexsort((pairs, -count))[::-1]  # the most frequent, lowest comes last, so it is what stays written
    found[pairs[order] // n_words] = pairs[order] % n_words
    tokens = np.full(n_features, NONE, dtype=np.int64)
    agreed = where & (word == found[feature])
    size = int(token.max(initial=0)) + 1
    pairs, count = np.unique(feature[agreed].astype(np.int64) * size + token[agreed], return_counts=True)
    order = np.lexsort((pairs, -count))[::-1]
    tokens[pairs[order] // size] = pairs[order] % size
    return found, tokens


def _proxy(kept: Kept, word: Ints, wanted: Ints) -> Marks:
    """Whether the destination's word occurred before, followed by its feature's word `wanted` [F]: [n]."""
    applies = np.zeros(len(kept), dtype=bool)
    place = np.arange(kept.tokens.shape[1])
    for low in range(0, len(kept), EXAMPLES_AT_ONCE):
        part = slice(low, low + EXAMPLES_AT_ONCE)
        words = word[kept.tokens[kept.row[part]]]
        dest, x = kept.dest[part, None], wanted[kept.feature[part], None]
        own = np.take_along_axis(words, dest, 1)
        # Source s from 2 on: what precedes source 1 is the row start.
        followed = (words[:, 1:-1] == own) & (words[:, 2:] == x) & (place[2:] <= dest)
        applies[part] = followed.any(1)
    return applies


def positional(kept: Kept, positions: Positions | None, n_features: int) -> tuple[Floats, Marks, Ints]:
    """A feature's score [F], which examples stand where it is at home [n], and that range of positions [F, 2].

    With p_b the share of a feature's whole activation in bucket b of positions and q_b the share of tokens there,
    score = sum over b of |p_b - q_b| / 2, the share of activation that would have to move if position did not matter, less what
    n firings thrown at random would give, (1/2) sum over b of sqrt(2 q_b (1 - q_b) / (pi n)). Threshold 0.5: most of it. A
    feature whose firings grow evenly with position, as those of induction do, has 0.25. It is at home in the buckets with
    p_b >= 2 q_b. Under 30 firings nothing is said.
    """
    score = np.full(n_features, np.nan, dtype=np.float32)
    places = np.full((n_features, 2), NONE, dtype=np.int64)
    if positions is None or not positions.tokens.sum():
        return score, np.zeros(len(kept), dtype=bool), places
    n = positions.firings.sum(1)
    mass = positions.firings * positions.mean.astype(np.float64)
    p = mass / np.maximum(mass.sum(1, keepdims=True), 1e-12)
    q = positions.tokens / positions.tokens.sum()
    luck = np.sqrt(2 * q * (1 - q) / (np.pi * np.maximum(n[:, None], 1))).sum(1) / 2
    apart = np.abs(p - q).sum(1) / 2
    score[n >= 30] = np.maximum(apart - luck, 0)[n >= 30]
    home = (p >= 2 * q) & (p > 0)
    known = home.any(1)
    places[known, 0] = positions.low[home.argmax(1)][known]
    places[known, 1] = positions.high[home.shape[1] - 1 - home[:, ::-1].argmax(1)][known]
    bucket = np.clip(np.searchsorted(positions.low, kept.dest, side="right") - 1, 0, None)
    return score, home[kept.feature, bucket], places


# ---- the verdict ----

THRESHOLDS = {
    "row start": 0.6,
    "token by induction": 0.5,
    "induction": 0.5,
    "successor": 0.5,
    "suppression": 0.5,
    "positional": 0.5,
    "duplicate token": 0.5,
    "current token": 0.5,
    "previous token": 0.5,
    "local": 0.8,
    "long-range": 0.5,
}
"""Least score of each family; reasons stand with its detector. The order is from the most specific to the least. Row starts
come first: where they give most, the rest is small. Positions come before what is trivially so at a row's first positions."""
FAMILIES = tuple(THRESHOLDS)
SIMPLE: dict[str, Callable[[Kept], Floats]] = {
    "row start": row_start,
    "induction": induction,
    "suppression": suppression,
    "duplicate token": duplicate,
    "current token": current,
    "previous token": previous,
    "local": local,
    "long-range": long_range,
}
"""Detectors that need nothing but the examples."""


def judge(kept: Kept, written: Written, positions: Positions | None, n_features: int) -> Judged:
    """The families of all features."""
    top = kept.band == 0
    numbers = {name: detector(kept) for name, detector in SIMPLE.items()}
    word = next_by_induction(kept, written, n_features)
    numbers["token by induction"] = word.number
    numbers["successor"], after = successor(kept, written)
    scores = {name: _mean(number, kept.feature, top, n_features) for name, number in numbers.items()}
    scores["positional"], at_home, places = positional(kept, positions, n_features)
    enough = {
        name: np.bincount(kept.feature[top & ~np.isnan(number)], minlength=n_features) >= MIN_EXAMPLES
        for name, number in numbers.items()
    }
    enough["positional"] = np.bincount(kept.feature[top], minlength=n_features) >= MIN_EXAMPLES
    allowed = {
        "token by induction": ~(word.in_bands < IN_BANDS),  # nan, no weaker examples: nothing speaks against it
        "long-range": _mean(kept.measure("distance"), kept.feature, top, n_features) >= 20,
    }
    holds = np.column_stack(
        [(np.nan_to_num(scores[name]) >= least) & enough[name] & allowed.get(name, True) for name, least in THRESHOLDS.items()]
    )
    supports = np.column_stack(
        [at_home if name == "positional" else np.nan_to_num(numbers[name]) >= least for name, least in THRESHOLDS.items()]
    )
    said = {name: holds[:, FAMILIES.index(name)] for name in FAMILIES}
    pair = _pair(kept, after, top, n_features)
    pair[~said["successor"]] = NONE
    places[~said["positional"]] = NONE
    tried = scores["token by induction"] > 0
    facts = Facts(
        next_token=np.where(said["token by induction"], word.token, NONE),
        pair=pair,
        places=places,
        evidence={
            "next": np.where(tried, scores["token by induction"], np.nan),
            "next_bands": np.where(tried, word.in_bands, np.nan),
            "next_follows": np.where(tried, word.follows, np.nan),
            "next_logit": np.where(tried, word.lifted, np.nan),
            "positional": scores["positional"],
        },
    )
    table = np.column_stack([scores[name] for name in FAMILIES])
    return Judged(table.astype(np.float32), holds, supports & holds[kept.feature], facts)


def _mean(number: Floats, feature: Ints, where: Marks, n_features: int) -> Floats:
    means: Floats = average(number[where, None].astype(np.float64), feature[where], n_features)[:, 0]
    return means


def _pair(kept: Kept, after: Ints, top: Marks, n_features: int) -> Ints:
    """The first strongest example's source and its promoted successor, [F, 2]."""
    pair = np.full((n_features, 2), NONE, dtype=np.int64)
    where = np.flatnonzero(top & (after != NONE))[::-1]
    pair[kept.feature[where], 0] = kept.token(kept.source)[where]
    pair[kept.feature[where], 1] = after[where]
    return pair


def family_of(holds: Sequence[bool]) -> str | None:
    """The most specific family that holds."""
    return next((name for name, held in zip(FAMILIES, holds, strict=True) if held), None)


def verdict(
    family: str | None, *, next_token: str, pair: tuple[str, str], places: tuple[int, int], distance: float
) -> str | None:
    """The family in words; token texts are quoted as they are. None for no family."""
    first, last = places
    match family:
        case "token by induction":
            return f"'{next_token}' is next by induction"
        case "successor":
            return f"after '{pair[0]}' comes '{pair[1]}'"
        case "positional":
            return (
                f"fires at position {first} of the row" if first == last else f"fires at positions {first} to {last} of the row"
            )
        case "long-range":
            return f"reads far back, {distance:.0f} tokens on average"
        case None:
            return None
    return SAID[family]


SAID = {
    "row start": "rests on the row start",
    "induction": "reads what followed the same token before (induction)",
    "suppression": "lowers the very token it reads (suppression)",
    "duplicate token": "reads earlier copies of the same token",
    "current token": "reads the token itself",
    "previous token": "reads the token right before",
    "local": f"reads the last few tokens, at most {NEAR} back",
}
"""Verdicts that name nothing."""
