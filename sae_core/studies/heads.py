"""What each head of a model does, as far as simple scores tell: where it attends, and what it writes of what it reads.

Three parts, for every head of the layers asked for:

(a) Random. Rows of distinct random tokens, said twice: the row start, r_1 ... r_n, r_1 ... r_n. Of a destination in the second
    half, the mean attention to: the token before (`previous`), the earlier copy of itself (`duplicate`), what followed
    that copy (`induction`), the row start (`start`), itself (`current`). Such rows have each of these sources just once, and
    nothing else that is known to draw attention: the score is about the rule, not about the text.
(b) Text. The same in real text, where a kind may have several sources: their sum, over the destinations that have any.
    Tokens are compared fuzzily (`studies/proxy.py`), and row starts are no destinations.
(c) Weights. `copying` and `own` of `studies/circuits.py` over a sample of the vocabulary, and `successor`: the mean over
    sequences (numbers, number words, weekdays, months, letters, ...) of the share of tokens whose successor is what the head
    raises most among the tokens of that class (Gould et al. 2023); `chance` is what luck gives.

    Weights speak of what a head would write if it attended to a token that nothing but the first block has touched
    (`Lens.alone`); by the time a deep layer reads it, a token's place may hold much else.

A role is a score that reaches its threshold (`ROLES`); a head may have several, or none. Scores of attention are correlations:
a head may attend to the token before for a reason of its own.
"""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_core.config import HeadsStudy
from sae_core.corpus import Rows
from sae_core.errors import UnsupportedModel
from sae_core.progress import Clock, Progress
from sae_core.studies import circuits
from sae_core.studies.passes import DOES, layers_of, row_tokens, rows_at_once
from sae_core.studies.proxy import NOBODY, fuzzy_classes, ordinary_tokens, prefix_lengths
from sae_core.studies.shares import Record, short

if TYPE_CHECKING:
    from sae_core.lens import AttentionRead, Lens

KINDS = ("previous", "duplicate", "induction", "start", "current")
"""Kinds of sources."""
ROLES: dict[str, tuple[str, float]] = {
    "induction": ("induction", DOES),
    "duplicate token": ("duplicate", DOES),
    "previous token": ("previous", DOES),
    "current token": ("current", DOES),
    "copying": ("copying", 0.5),
    "copy suppression": ("copying", -0.5),
    "successor": ("successor", 0.5),
}
"""Role: the score of (a) or (c) that speaks for it, and the least it must be (the most, where that is below 0).

Copying, 0.5: three quarters of the eigenvalues' size is of the sign. Heads of random weights have |score| below 0.3 in 64
dimensions. Successor, 0.5: half of what is asked, where luck gives a tenth.
"""


class Attention(Record):
    """Mean attention to each kind of source."""

    previous: float | None
    """To the token before."""
    duplicate: float | None
    """To earlier copies of the token itself."""
    induction: float | None
    """To what followed these copies."""
    start: float | None
    """To row starts, where attention rests."""
    current: float | None
    """To the token itself. Each is None where no destination had such a source."""


class HeadAttention(Record):
    """A head in part (a) or (b)."""

    layer: int
    head: int
    attention: Attention


class Seen(Record):
    """Part (a) or (b)."""

    rows: int
    tokens: int
    destinations: list[int]
    """How many destinations have sources of each of KINDS."""
    heads: list[HeadAttention]


class HeadWeights(Record):
    """A head in part (c)."""

    layer: int
    head: int
    copying: float
    """`circuits.Copying.eigenvalues`."""
    own: float
    successor: float | None
    """None where the vocabulary has no class of tokens that are said in order."""
    by_sequence: dict[str, float]


class Weights(Record):
    """Part (c)."""

    tokens: int
    """Of the vocabulary, that copying was asked of."""
    chance: float | None
    """The successor score of a head that knows nothing."""
    sequences: dict[str, int]
    """How many tokens of each sequence were asked for their successor."""
    heads: list[HeadWeights]
    note: str | None = None
    """Why there are none."""


class Head(Record):
    """All that is known of a head."""

    layer: int
    head: int
    roles: list[str]
    """Which of ROLES, in their order."""
    random: Attention
    text: Attention | None
    copying: float | None
    """As `HeadWeights` has them; None where the model's weights cannot be asked."""
    own: float | None
    successor: float | None
    by_sequence: dict[str, float] = {}
    """Successor score of each sequence; empty for heads that hardly score."""


class Heads(Record):
    """What the study found."""

    kind: Literal["heads"] = "heads"
    summary: str
    """In a line."""
    layers: list[int]
    n_heads: int
    """Query heads in a layer."""
    n_layers: int
    """Of the model."""
    samples: int
    """Random rows."""
    length: int
    """Tokens in each."""
    vocabulary: int
    """Tokens that copying was asked of."""
    chance: float | None
    """The successor score of a head that knows nothing."""
    sequences: dict[str, int]
    thresholds: dict[str, list[str | float]]
    """ROLES."""
    heads: list[Head]
    """By layer and head."""
    corpus: str | None
    text_rows: int
    text_tokens: int
    notes: list[str]


# ---------------------------------------------------------------------------------------------------------- attention


class Sources(NamedTuple):
    """Which (destination, source) pairs of rows are of each kind, and which destinations count."""

    kinds: Tensor
    """bool [len(KINDS), b, dest, src]"""
    dest: Tensor
    """bool [b, dest]"""


def sources(classes: Tensor, dest: Tensor) -> Sources:
    """From the classes of tokens [b, pos], equal for those that count as the same, NOBODY for row starts."""
    length = classes.shape[1]
    place = torch.arange(length)
    gap = place[:, None] - place  # [dest, src]
    text = (classes != NOBODY)[:, None]  # sources that are text
    same = (classes[:, :, None] == classes[:, None]) & text
    kinds = [
        (gap == 1) & text,
        same & (gap > 0),
        (prefix_lengths(classes, 1) > 0) & text,
        ~text & (gap >= 0),
        (gap == 0) & text,
    ]
    return Sources(torch.stack([kind.expand_as(same) for kind in kinds]), dest & text[:, 0])


class _Means:
    """Sums of attention by layer, head and kind, over the destinations that have sources of the kind."""

    def __init__(self, lens: "Lens", layers: list[int]) -> None:
        self.lens, self.layers = lens, layers
        self.sums = torch.zeros(len(layers), lens.info.n_heads, len(KINDS), dtype=torch.float64)
        self.destinations = torch.zeros(len(KINDS), dtype=torch.int64)

    def look_at(self, tokens: Tensor, found: Sources) -> None:
        """Take in rows [b, pos]."""
        wanted = found.kinds & found.dest[None, :, :, None]
        self.destinations += wanted.any(3).sum((1, 2))
        masks = wanted.to(self.lens.device)

        def look(layer: int, read: "AttentionRead") -> None:
            per_kind = [torch.einsum("bhds,bds->h", read.pattern, mask.to(read.pattern.dtype)) for mask in masks]
            self.sums[self.layers.index(layer)] += torch.stack(per_kind, 1).double().cpu()

        self.lens.follow_attention(tokens, self.layers, look)

    def seen(self, rows: int, tokens: int) -> Seen:
        """The means."""
        heads = []
        for index, layer in enumerate(self.layers):
            for head, sums in enumerate(self.sums[index].tolist()):
                means = [short(a / n) if n else None for a, n in zip(sums, self.destinations.tolist(), strict=True)]
                attention = Attention(**dict(zip(KINDS, means, strict=True)))
                heads.append(HeadAttention(layer=layer, head=head, attention=attention))
        return Seen(rows=rows, tokens=tokens, destinations=self.destinations.tolist(), heads=heads)


def said_twice(cfg: HeadsStudy, lens: "Lens") -> Tensor:
    """int64 [samples, 1 + 2n]: the row start, then n distinct random tokens, and the same again."""
    n = (cfg.length - 1) // 2
    ids = row_tokens(cfg, lens, n)
    draw = np.random.default_rng(cfg.seed % 2**63)
    tokens = np.stack([draw.choice(ids, n, replace=False) for _ in range(cfg.samples)])
    start = np.full((cfg.samples, 1), lens.row_start)
    return torch.from_numpy(np.concatenate([start, tokens, tokens], 1).astype(np.int64))


def on_random(lens: "Lens", cfg: HeadsStudy) -> Generator[Progress, None, Seen]:
    """Part (a)."""
    tokens, means = said_twice(cfg, lens), _Means(lens, layers_of(cfg, lens))
    n, length = tokens.shape
    at_once, clock = rows_at_once(cfg, length), Clock("random", n * length)
    second = torch.arange(length) > length // 2
    for low in range(0, n, at_once):
        part = tokens[low : low + at_once]
        classes = part.clone()
        classes[:, 0] = NOBODY
        means.look_at(part, sources(classes, second.expand_as(part)))
        yield clock.at((low + len(part)) * length)
    return means.seen(n, n * length)


def in_text(lens: "Lens", rows: Rows, cfg: HeadsStudy) -> Generator[Progress, None, Seen]:
    """Part (b), on the first `text_rows` rows."""
    means, classes_of = _Means(lens, layers_of(cfg, lens)), fuzzy_classes(lens)
    n, at_once = min(cfg.text_rows, len(rows.train)), rows_at_once(cfg, rows.context)
    clock = Clock("text", n * rows.context)
    for low in range(0, n, at_once):
        tokens = torch.from_numpy(rows.train[low : min(low + at_once, n)].astype("int64"))
        classes = classes_of[tokens]
        classes[:, 0] = NOBODY
        means.look_at(tokens, sources(classes, torch.ones_like(tokens, dtype=torch.bool)))
        yield clock.at((low + len(tokens)) * rows.context)
    return means.seen(n, n * rows.context)


# ------------------------------------------------------------------------------------------------------------- weights


def on_weights(lens: "Lens", cfg: HeadsStudy) -> Generator[Progress, None, Weights]:
    """Part (c). A model whose values come by no one map gets none, with the reason."""
    layers, ordinary = layers_of(cfg, lens), ordinary_tokens(lens)
    every = circuits.classes(dict(zip(ordinary, lens.token_texts(ordinary), strict=True)))
    draw = np.random.default_rng((cfg.seed % 2**63, 2))
    sample = np.sort(draw.choice(ordinary, min(cfg.vocabulary, len(ordinary)), replace=False)).tolist()
    known: dict[str, int] = {}
    for one in every:
        known[one.sequence] = known.get(one.sequence, 0) + len(one.after)
    try:
        lens.value_map(layers[0])
    except UnsupportedModel as error:
        return Weights(tokens=0, chance=None, sequences={}, heads=[], note=str(error))
    # The sample and the classes' tokens side by side; the classes are found again by their places.
    ids = sample + [token for one in every for token in one.ids]
    streams, clock = lens.alone(ids), Clock("weights", len(layers), "layers")
    heads = []
    for done, layer in enumerate(layers, 1):
        v = lens.values(streams.later if layer else streams.first, layer)
        heads += [_of_head(lens, layer, head, v, ids, len(sample), every) for head in range(lens.info.n_heads)]
        yield clock.at(done)
    luck = circuits.by_sequence([1 / len(one.ids) for one in every], every)
    chance = short(sum(luck.values()) / len(luck)) if luck else None
    return Weights(tokens=len(sample), chance=chance, sequences=known, heads=heads)


def _of_head(
    lens: "Lens", layer: int, head: int, v: Tensor, ids: Sequence[int], n: int, every: Sequence[circuits.Class]
) -> HeadWeights:
    """One head, from values [len(ids), n_kv_heads, d_head]; the first n of `ids` are the sample, the rest the classes'."""
    d, group = lens.info.d_head, lens.info.n_heads // lens.info.n_kv_heads
    slices = torch.zeros(d, lens.info.d_in, device=lens.device)
    slices[:, head * d : (head + 1) * d] = torch.eye(d, device=lens.device)
    o = lens.logit_weights(slices, layer)[:, torch.tensor(ids, device=lens.device)].T
    own = v[:, head // group]
    found = circuits.copying(own[:n], o[:n])
    shares, low, mean = [], n, own[:n].mean(0)
    for one in every:
        part = slice(low, low + len(one.ids))
        shares.append(circuits.successors((own[part] - mean) @ o[part].T, one))
        low += len(one.ids)
    by = {sequence: short(share) for sequence, share in circuits.by_sequence(shares, every).items()}
    return HeadWeights(
        layer=layer,
        head=head,
        copying=short(found.eigenvalues),
        own=short(found.own),
        successor=short(sum(by.values()) / len(by)) if by else None,
        by_sequence=by,
    )


# ----------------------------------------------------------------------------------------------------------- the result

DETAILED = 0.3
"""Heads with a successor score below this keep no more than the score."""


def heads(lens: "Lens", cfg: HeadsStudy, random: Seen, text: Seen | None, weights: Weights) -> Heads:
    """The parts put together."""
    seen = {(one.layer, one.head): one.attention for one in text.heads} if text else {}
    written = {(one.layer, one.head): one for one in weights.heads}
    every = [_head(one, seen.get((one.layer, one.head)), written.get((one.layer, one.head))) for one in random.heads]
    notes = [] if text else ["No text was given, so only random rows were read."]
    if weights.note:
        notes.append(weights.note)
    return Heads(
        summary=_summary(every),
        layers=layers_of(cfg, lens),
        n_heads=lens.info.n_heads,
        n_layers=lens.info.n_layers,
        samples=random.rows,
        length=random.tokens // random.rows,
        vocabulary=weights.tokens,
        chance=weights.chance,
        sequences=weights.sequences,
        thresholds={role: list(rule) for role, rule in ROLES.items()},
        heads=every,
        corpus=cfg.corpus if text else None,
        text_rows=text.rows if text else 0,
        text_tokens=text.tokens if text else 0,
        notes=notes,
    )


def _head(random: HeadAttention, text: Attention | None, weights: HeadWeights | None) -> Head:
    known = {**random.attention.model_dump(), **(weights.model_dump() if weights else {})}
    successor = weights.successor if weights else None
    return Head(
        layer=random.layer,
        head=random.head,
        roles=[role for role, (score, least) in ROLES.items() if reaches(known.get(score), least)],
        random=random.attention,
        text=text,
        copying=weights.copying if weights else None,
        own=weights.own if weights else None,
        successor=successor,
        by_sequence=weights.by_sequence if weights and successor is not None and successor >= DETAILED else {},
    )


def reaches(score: float | None, least: float) -> bool:
    """Whether a score speaks for a role: at least so much, or at most, where the threshold is below 0."""
    return score is not None and (score >= least if least >= 0 else score <= least)


def _summary(every: Sequence[Head]) -> str:
    parts = []
    for role, (score, least) in ROLES.items():
        found = [one for one in every if role in one.roles]
        found.sort(key=lambda one: -abs(_score(one, score)) if least else 0.0)
        if found:
            shown = ", ".join(f"{one.layer}.{one.head}" for one in found[:3]) + (", ..." if len(found) > 3 else "")
            parts.append(f"{len(found)} {role} ({shown})")
    return f"{'; '.join(parts) or 'no head with a role'}; of {len(every)} heads"


def _score(head: Head, name: str) -> float:
    value = getattr(head.random, name) if name in KINDS else getattr(head, name)
    return float(value or 0.0)
