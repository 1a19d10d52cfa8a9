"""Which heads do induction, and whether a long repeated prefix is what they need (Kissane et al. 2024, "long-prefix induction").

An induction head at d attends to a source s whose token before it is the destination's token: [A] [B] ... [A] -> [B]. The
prefix is what repeats: the p tokens before s are the last p tokens up to d. Four parts, for every head of the layers asked for:

(a) Synthetic. Rows of distinct random tokens, in which the p tokens from a1 on are copied to a2. The induction score is
    A[a2 + p - 1, a1 + p]: attention from the end of the second copy to what followed the first. By p = 1, 2, ..., `prefixes`.
    On the same rows, what the head attends to instead: the token before, the copied token itself, the row start.
(b) On the same rows, what the head writes straight to the logit of that following token, above the mean token's, with the
    final norm's scale as it is at the destination (`Lens.head_logits`). In the paper's code the scale is that of the next
    layer's norm; here it is the one that the logits really go through.
(c) In real text, for heads that (a) finds to do induction: the first place in a row where the head attends (more than
    `attends`) to a source with a prefix of two or more. The token before the prefix's last is replaced by a random one on the
    source's side, so that a prefix of one token is left. Attention before and after, with 95 % intervals over places; and, as
    a control, with the same random token put where no prefix is.
(d) In real text, for every head: how long the prefix is wherever the head attends, by count; and the mean attention that
    goes to sources with the longest prefix there is, by that length. Here tokens are compared fuzzily (`studies/proxy.py`).

The pattern of one layer is held at a time, of `pass_tokens` tokens: memory does not grow with layers, samples or rows.
"""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_core.config import InductionStudy, PrefixStudy
from sae_core.corpus import Rows
from sae_core.evaluate import Interval, interval
from sae_core.progress import Clock, Progress
from sae_core.studies.passes import DOES, layers_of, row_tokens, rows_at_once
from sae_core.studies.proxy import NOBODY, fuzzy_classes, ordinary_tokens, prefix_lengths
from sae_core.studies.shares import Record, short

if TYPE_CHECKING:
    from sae_core.lens import AttentionRead, Lens

Role = Literal["long-prefix", "short-prefix", "not induction"]

LONGEST = 10
"""In real text, prefixes of this length and longer count together."""
WEAK = 0.5
"""A long-prefix head has less than this share of its best score after a prefix of one."""
DETAILED = 0.1
"""Heads that never score this much keep no more than their scores: most heads, in large models."""


class HeadScores(Record):
    """A head on synthetic rows; lists are by the length of the prefix, from 1."""

    layer: int
    head: int
    score: list[float]
    """Mean induction score."""
    score_error: list[float]
    """Its standard error over the samples."""
    logit: list[float]
    """Mean of what it writes straight to the right token's logit."""
    logit_error: list[float]
    previous: float
    """On the same rows, with prefixes of two and more: mean attention from the copy's last token to the token before it ..."""
    duplicate: float
    """... to the token that it is a copy of ..."""
    start: float
    """... and to the row start, where attention rests."""


class Cut(Record):
    """A head at places with a prefix of two or more, before and after it was cut down to one."""

    places: int
    prefix: float
    """Mean length of the prefix before."""
    before: Interval
    after: Interval
    control: Interval | None
    """With the random token elsewhere; None where no row had room for it."""
    change: Interval
    """After less before, paired."""


class HeadText(Record):
    """A head in real text."""

    layer: int
    head: int
    attended: list[int]
    """How often it attends to a source with a prefix of 0, 1, ..., LONGEST or more tokens; row starts are no sources here."""
    target: list[float | None]
    """Mean attention to all sources with the longest prefix that the destination has, by that length from 1; None where
    no destination had such."""
    cut: Cut | None
    """For heads that do induction, where they attend to a prefix of two or more anywhere."""


class Synthetic(Record):
    """Parts (a) and (b)."""

    heads: list[HeadScores]


class InText(Record):
    """Parts (c) and (d)."""

    corpus: str
    rows: int
    tokens: int
    destinations: list[int]
    """How many destinations have a longest prefix of 0, 1, ..., LONGEST or more."""
    heads: list[HeadText]


class Head(Record):
    """All that is known of a head."""

    layer: int
    head: int
    role: Role
    best: float
    """Largest of `score`."""
    score: list[float]
    previous: float
    """As `HeadScores` has them."""
    duplicate: float
    start: float
    score_error: list[float] = []
    """From here on empty or None for heads that hardly score."""
    logit: list[float] = []
    logit_error: list[float] = []
    attended: list[int] = []
    target: list[float | None] = []
    cut: Cut | None = None


class Induction(Record):
    """What the study found."""

    kind: Literal["induction"] = "induction"
    summary: str
    """In a line."""
    layers: list[int]
    n_heads: int
    """Query heads in a layer."""
    n_layers: int
    """Of the model."""
    prefixes: list[int]
    samples: int
    """For each length of the prefix."""
    attends: float
    """The share of a head's attention from which it counts as attending."""
    heads: list[Head]
    """Strongest first."""
    corpus: str | None
    text_rows: int
    text_tokens: int
    destinations: list[int]
    notes: list[str]


def role(score: Sequence[float]) -> Role:
    """What a head does, by its mean induction scores after prefixes of 1, 2, ... tokens.

    not induction   its best score is below 0.3. The paper takes 0.3 of the attention for "attends"; heads that do
                    induction now and then by another way (a duplicate token's, say) stay far below it on distinct random tokens.
    long-prefix     after one token it scores less than half of its best: most of what it does, it does for longer prefixes.
    short-prefix    one token is enough for at least half.

    A share of the head's own best, not a number: heads differ in how much attention they leave on the row start whatever comes.
    In the paper's pair on GPT-2 the share is below 0.45 for 5.1 (from < 0.3 to > 0.7) and near 1 for 5.5, so a half
    parts them with room on both sides.
    """
    best = max(score)
    if best < DOES:
        return "not induction"
    return "long-prefix" if score[0] < WEAK * best else "short-prefix"


# ------------------------------------------------------------------------------------------------------------- synthetic


class Copies(NamedTuple):
    """Rows with a prefix copied within each."""

    tokens: Tensor
    """int64 [n, length]"""
    dest: Tensor
    """int64 [n]: last token of the second copy, a2 + p - 1."""
    source: Tensor
    """int64 [n]: token after the first copy, a1 + p."""
    prefix: Tensor
    """int64 [n]: p."""


def copied_prefixes(cfg: InductionStudy | PrefixStudy, lens: "Lens") -> Copies:
    """`samples` rows for each prefix length: the row start, then distinct random tokens, p of them copied from a1 to a2.

    a1 is uniform in 1 ... length - 2 (prefixes + 1) - 10 (98 of 128, the paper's), so that the longest prefix leaves it room;
    a2 in a1 + p + 1 ... length - 1 - p, so that a token at least parts the copies, and one follows the second.
    """
    ids = row_tokens(cfg, lens, cfg.length - 1)
    draw = np.random.default_rng(cfg.seed % 2**63)
    last = max(1, cfg.length - 2 * (cfg.prefixes + 1) - 10)
    made = []
    for p in range(1, cfg.prefixes + 1):
        for _ in range(cfg.samples):
            row = np.empty(cfg.length, np.int64)
            row[0], row[1:] = lens.row_start, draw.choice(ids, cfg.length - 1, replace=False)
            a1 = int(draw.integers(1, last, endpoint=True))
            a2 = int(draw.integers(a1 + p + 1, cfg.length - 1 - p, endpoint=True))
            row[a2 : a2 + p] = row[a1 : a1 + p]
            made.append((row, a2 + p - 1, a1 + p, p))
    rows, *columns = zip(*made, strict=True)
    return Copies(torch.from_numpy(np.stack(rows)), *(torch.tensor(column) for column in columns))


def synthetic(lens: "Lens", cfg: InductionStudy) -> Generator[Progress, None, Synthetic]:
    """Parts (a) and (b)."""
    layers, copies = layers_of(cfg, lens), copied_prefixes(cfg, lens)
    n_heads = lens.info.n_heads
    # Sums over samples of the columns of `_scores`; in fp64, since errors come from differences of them.
    sums = torch.zeros(len(layers), n_heads, cfg.prefixes, len(COLUMNS), dtype=torch.float64)
    at_once, clock = rows_at_once(cfg, cfg.length), Clock("synthetic", len(copies.tokens) * cfg.length)
    for low in range(0, len(copies.tokens), at_once):
        part = Copies(*(column[low : low + at_once] for column in copies))
        for index, found in enumerate(_scores(lens, layers, part)):
            sums[index].index_add_(1, part.prefix - 1, found.transpose(0, 1))
        yield clock.at((low + len(part.tokens)) * cfg.length)
    mean = sums / cfg.samples
    # n / (n - 1) makes the variance unbiased; rounding may leave it a hair below 0.
    spread = (mean[..., 1:4:2] - mean[..., 0:4:2] ** 2).clamp_min(0) * cfg.samples / (cfg.samples - 1)
    error = (spread / cfg.samples).sqrt()
    heads = []
    for index, layer in enumerate(layers):
        for head in range(n_heads):
            of_score, of_logit = mean[index, head, :, 0], mean[index, head, :, 2]
            lists = (of_score, error[index, head, :, 0], of_logit, error[index, head, :, 1])
            numbers = [[short(value) for value in one.tolist()] for one in lists]
            # After a prefix of one, the token before may be what followed the first copy.
            elsewhere = [short(value) for value in mean[index, head, 1:, 4:].mean(0).tolist()]
            heads.append(
                HeadScores(
                    layer=layer,
                    head=head,
                    score=numbers[0],
                    score_error=numbers[1],
                    logit=numbers[2],
                    logit_error=numbers[3],
                    previous=elsewhere[0],
                    duplicate=elsewhere[1],
                    start=elsewhere[2],
                )
            )
    return Synthetic(heads=heads)


COLUMNS = ("score", "its square", "logit", "its square", "previous", "duplicate", "start")


def _scores(lens: "Lens", layers: Sequence[int], part: Copies) -> list[Tensor]:
    """For each layer [n, n_heads, len(COLUMNS)], fp64."""
    at, dest, source = (tensor.to(lens.device) for tensor in (torch.arange(len(part.tokens)), part.dest, part.source))
    attention: dict[int, list[Tensor]] = {}
    z: dict[int, Tensor] = {}

    def look(layer: int, read: "AttentionRead") -> None:
        row = read.pattern[at, :, dest]  # [n, n_heads, src]; indexing copies, so the rest of the pattern is let go
        attention[layer] = [row[at, :, to].double().cpu() for to in (source, dest - 1, source - 1, torch.zeros_like(dest))]
        z[layer] = read.z[at, dest]

    final = lens.follow_attention(part.tokens, layers, look, to_end=True)
    assert final is not None
    right = part.tokens.to(lens.device)[at, source]
    found = []
    for layer in layers:
        logit = lens.head_logits(z[layer], layer, final[at, dest], right).double().cpu()
        score, *elsewhere = attention[layer]
        found.append(torch.stack([score, score**2, logit, logit**2, *elsewhere], -1))
    return found


# ------------------------------------------------------------------------------------------------------------- real text


class Place(NamedTuple):
    """Where a head attends to an induction target."""

    layer: int
    head: int
    row: int
    dest: int
    source: int
    prefix: int
    before: float
    """Attention there."""


def in_text(
    lens: "Lens", rows: Rows, cfg: InductionStudy, does_induction: Sequence[tuple[int, int]]
) -> Generator[Progress, None, InText]:
    """Parts (c) and (d), on the first `text_rows` rows; `does_induction` are the (layer, head) whose prefixes are cut."""
    assert cfg.corpus is not None
    layers, classes_of = layers_of(cfg, lens), fuzzy_classes(lens)
    watch = _Watch(lens, cfg, layers, does_induction)
    n, at_once = min(cfg.text_rows, len(rows.train)), rows_at_once(cfg, rows.context)
    clock = Clock("text", n * rows.context)
    for low in range(0, n, at_once):
        tokens = torch.from_numpy(rows.train[low : min(low + at_once, n)].astype("int64"))
        classes = classes_of[tokens]
        classes[:, 0] = NOBODY
        watch.look_at(tokens, low, classes)
        yield clock.at((low + len(tokens)) * rows.context)
    cuts = yield from _cut(lens, rows, cfg, watch.places, classes_of)
    heads = []
    for index, layer in enumerate(layers):
        for head in range(lens.info.n_heads):
            total, times = watch.target[index, head, 1:].tolist(), watch.destinations[1:].tolist()
            heads.append(
                HeadText(
                    layer=layer,
                    head=head,
                    attended=watch.attended[index, head].tolist(),
                    target=[short(a / b) if b else None for a, b in zip(total, times, strict=True)],
                    cut=cuts.get((layer, head)),
                )
            )
    return InText(corpus=cfg.corpus, rows=n, tokens=n * rows.context, destinations=watch.destinations.tolist(), heads=heads)


class _Watch:
    """What is counted of each head while text goes by."""

    def __init__(self, lens: "Lens", cfg: InductionStudy, layers: list[int], does_induction: Sequence[tuple[int, int]]) -> None:
        self.lens, self.cfg, self.layers = lens, cfg, layers
        n_heads = lens.info.n_heads
        self.attended = torch.zeros(len(layers), n_heads, LONGEST + 1, dtype=torch.int64)
        self.target = torch.zeros(len(layers), n_heads, LONGEST + 1, dtype=torch.float64)
        self.destinations = torch.zeros(LONGEST + 1, dtype=torch.int64)
        self.places: dict[tuple[int, int], list[Place]] = {head: [] for head in does_induction}

    def look_at(self, tokens: Tensor, first_row: int, classes: Tensor) -> None:
        """Take in rows [b, pos] with the fuzzy classes of their tokens."""
        prefix = prefix_lengths(classes, LONGEST)  # [b, dest, src]
        longest = prefix.amax(2).long()  # [b, dest]
        text = (classes != NOBODY).to(self.lens.device)  # row starts, where attention rests, are neither source nor destination
        self.destinations += torch.bincount(longest[:, 1:].flatten(), minlength=LONGEST + 1)
        aimed = ((prefix == longest[:, :, None]) & (prefix > 0)).to(self.lens.device)

        def look(layer: int, read: "AttentionRead") -> None:
            index = self.layers.index(layer)
            gets = (read.pattern * aimed[:, None]).sum(-1).transpose(0, 1).flatten(1)  # [n_heads, b x dest]
            self.target[index].index_add_(1, longest.flatten(), gets.double().cpu())
            hits = (read.pattern > self.cfg.attends) & text[:, None, None, :] & text[:, None, :, None]
            b, head, dest, source = (column.cpu() for column in hits.nonzero(as_tuple=True))
            length = prefix[b, dest, source].long()
            flat = torch.bincount(head * (LONGEST + 1) + length, minlength=self.attended[index].numel())
            self.attended[index] += flat.view_as(self.attended[index])
            self._find_places(layer, first_row, read.pattern, torch.stack([b, head, dest, source, length], 1)[length >= 2])

        self.lens.follow_attention(tokens, self.layers, look)

    def _find_places(self, layer: int, first_row: int, pattern: Tensor, hits: Tensor) -> None:
        """Keep of hits [n, 5] (row, head, destination, source, prefix) the first in each row, for heads that want places."""
        seen: set[tuple[int, int]] = set()
        for b, head, dest, source, length in hits.tolist():  # in the order of row, head, destination
            places = self.places.get((layer, head))
            if places is None or (b, head) in seen or len(places) >= self.cfg.cuts:
                continue
            seen.add((b, head))
            places.append(Place(layer, head, first_row + b, dest, source, length, float(pattern[b, head, dest, source])))


# ------------------------------------------------------------------------------------------------------ cutting prefixes


def _cut(
    lens: "Lens", rows: Rows, cfg: InductionStudy, places: dict[tuple[int, int], list[Place]], classes_of: Tensor
) -> Generator[Progress, None, dict[tuple[int, int], Cut]]:
    """Part (c): attention at each place with its prefix cut, and with another token replaced."""
    heads: dict[tuple[int, int, int], list[Place]] = {}  # by (row, destination, source), which heads share
    for found in places.values():
        for place in found:
            heads.setdefault((place.row, place.dest, place.source), []).append(place)
    draw, ordinary = np.random.default_rng((cfg.seed % 2**63, 1)), ordinary_tokens(lens)
    changed: list[tuple[Tensor, list[Place], bool]] = []
    for (row, dest, source), there in heads.items():
        tokens = torch.from_numpy(rows.train[row].astype("int64"))
        prefix = max(place.prefix for place in there)
        cut, control = _changed_rows(tokens, dest, source, prefix, classes_of, ordinary, draw)
        changed.append((cut, there, False))
        if control is not None:
            changed.append((control, there, True))
    after: dict[Place, float] = {}
    controls: dict[Place, float] = {}
    at_once, clock = rows_at_once(cfg, rows.context), Clock("cut", len(changed) * rows.context)
    for low in range(0, len(changed), at_once):
        part = changed[low : low + at_once]
        for b, place, value in _attention_at(lens, torch.stack([tokens for tokens, _, _ in part]), [one[1] for one in part]):
            (controls if part[b][2] else after)[place] = value
        yield clock.at((low + len(part)) * rows.context)
    return {head: _cut_of(found, after, controls) for head, found in places.items() if found}


def _changed_rows(
    tokens: Tensor, dest: int, source: int, prefix: int, classes_of: Tensor, ordinary: Sequence[int], draw: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """The row [pos] with the token before the prefix's last replaced by a random one, and the same with that token at a place
    outside both copies instead; None where there is no such place."""
    while True:
        token = int(draw.choice(ordinary))
        if classes_of[token] != classes_of[tokens[dest - 1]]:  # else the prefix would go on
            break
    cut = tokens.clone()
    cut[source - 2] = token
    # Before the destination, since nothing after it has a say; not in the copies, nor the source itself.
    taken = {*range(source - prefix, source + 1), *range(dest - prefix, dest + 1)}
    free = [position for position in range(1, dest) if position not in taken]
    if not free:
        return cut, None
    control = tokens.clone()
    control[int(draw.choice(free))] = token
    return cut, control


def _attention_at(lens: "Lens", tokens: Tensor, places: list[list[Place]]) -> list[tuple[int, Place, float]]:
    """(row of the batch, place, attention) for the places of each row of tokens [b, pos]."""
    wanted: dict[int, list[tuple[int, Place]]] = {}
    for b, there in enumerate(places):
        for place in there:
            wanted.setdefault(place.layer, []).append((b, place))
    found: list[tuple[int, Place, float]] = []

    def look(layer: int, read: "AttentionRead") -> None:
        index = [[b, place.head, place.dest, place.source] for b, place in wanted[layer]]
        values = read.pattern[tuple(torch.tensor(index, device=read.pattern.device).T)].tolist()
        found.extend((b, place, value) for (b, place), value in zip(wanted[layer], values, strict=True))

    lens.follow_attention(tokens, sorted(wanted), look)
    return found


def _cut_of(places: list[Place], after: dict[Place, float], controls: dict[Place, float]) -> Cut:
    def mean(values: list[float]) -> Interval:
        found = interval(torch.tensor(values, dtype=torch.float64))
        return Interval(**{name: None if value is None else short(value) for name, value in found.model_dump().items()})

    controlled = [controls[place] for place in places if place in controls]
    return Cut(
        places=len(places),
        prefix=short(sum(place.prefix for place in places) / len(places)),
        before=mean([place.before for place in places]),
        after=mean([after[place] for place in places]),
        control=mean(controlled) if controlled else None,
        change=mean([after[place] - place.before for place in places]),
    )


# ------------------------------------------------------------------------------------------------------------ the result


def doing_induction(scores: Synthetic) -> list[tuple[int, int]]:
    """(layer, head) of the heads that (a) finds to do induction."""
    return [(head.layer, head.head) for head in scores.heads if role(head.score) != "not induction"]


def induction(lens: "Lens", cfg: InductionStudy, scores: Synthetic, text: InText | None) -> Induction:
    """The parts put together."""
    known = {(head.layer, head.head): head for head in text.heads} if text else {}
    heads = [_head(one, known.get((one.layer, one.head))) for one in scores.heads]
    heads.sort(key=lambda head: (-head.best, head.layer, head.head))
    notes = [] if text else ["No text was given, so only synthetic rows were read."]
    return Induction(
        summary=_summary(heads),
        layers=layers_of(cfg, lens),
        n_heads=lens.info.n_heads,
        n_layers=lens.info.n_layers,
        prefixes=list(range(1, cfg.prefixes + 1)),
        samples=cfg.samples,
        attends=cfg.attends,
        heads=heads,
        corpus=text.corpus if text else None,
        text_rows=text.rows if text else 0,
        text_tokens=text.tokens if text else 0,
        destinations=text.destinations if text else [],
        notes=notes,
    )


def _head(scores: HeadScores, text: HeadText | None) -> Head:
    best = max(scores.score)
    head = Head(
        layer=scores.layer,
        head=scores.head,
        role=role(scores.score),
        best=best,
        score=scores.score,
        previous=scores.previous,
        duplicate=scores.duplicate,
        start=scores.start,
    )
    if best < DETAILED:
        return head
    detail = {"score_error": scores.score_error, "logit": scores.logit, "logit_error": scores.logit_error}
    seen = {"attended": text.attended, "target": text.target, "cut": text.cut} if text else {}
    return head.model_copy(update=detail | seen)


def _summary(heads: Sequence[Head]) -> str:
    parts = []
    for kind in ("short-prefix", "long-prefix"):
        found = [f"{head.layer}.{head.head}" for head in heads if head.role == kind]
        shown = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
        parts.append(f"{len(found)} {kind} head{'' if len(found) == 1 else 's'}{f' ({shown})' if found else ''}")
    return f"{'; '.join(parts)}; of {len(heads)} heads"
