"""Specificity and sensitivity of a feature against a proxy (Kissane et al. 2024, "' board' is next by induction").

For every token of some rows that the SAE reads (row starts and sinks are left out): the feature's activation f, in fp32, and
whether the proxy holds. From these

    four cells       fires (f > 0) and holds, fires alone, holds alone, neither
    precision        of the tokens on which it fires, the share on which the proxy holds; also of those with f >= threshold
    recall           of the tokens on which the proxy holds, the share on which it fires; also with f >= threshold
    specificity      of the tokens on which the proxy does not hold, the share on which it does not fire
    histogram        of f > 0, bars of equal width up to the largest, split by the proxy
    expected value   of each bar: its middle x its count / all firings, which add up to the mean activation: what the
                     feature says, rather than how often. (The paper's code divides by the firings of the bar's own class, so
                     its two classes cannot be compared; here both are divided by the same.)

Shares come with Wilson's 95 % intervals. Examples are drawn uniformly: false positives from ranges of activation, since
there are always more weak ones, false negatives from all. What is kept while reading are the firings of the one feature (some
20 bytes each) and a sample of the misses.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_core.config import SpecificityStudy, said
from sae_core.corpus import Rows
from sae_core.progress import Clock, Progress
from sae_core.saes import SAE, row_starts
from sae_core.studies.proxy import Proxies
from sae_core.studies.shares import Record, Share, share, short

if TYPE_CHECKING:
    from sae_core.lens import Lens

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]


class Example(Record):
    """A token with the text around it."""

    row: int
    """Index of the row among those of the corpus."""
    position: int
    """In the row."""
    activation: float
    preactivation: float
    texts: list[str]
    """Tokens shown."""
    at: int
    """Which of them it is about."""


class Range(Record):
    """Firings with low <= activation < high; the last range holds the strongest too."""

    low: float
    high: float
    precision: Share
    """Of these firings, the share on which the proxy holds."""
    false_positives: list[Example]
    """Drawn uniformly from those on which it does not."""
    true_positives: list[Example]
    """And from those on which it does."""


class Threshold(Record):
    """Precision and recall of "the activation is at least so much", at the lower edge of each bar of the histogram."""

    activation: list[float]
    precision: list[float | None]
    precision_low: list[float | None]
    precision_high: list[float | None]
    recall: list[float | None]
    recall_low: list[float | None]
    recall_high: list[float | None]


class Specificity(Record):
    """What the study found."""

    kind: Literal["specificity"] = "specificity"
    summary: str
    """In a line."""
    proxy: str
    """In words."""
    rows: int
    tokens: int
    """Tokens judged."""
    excluded: int
    """Tokens left out: row starts and sinks."""
    both: int
    """Tokens on which it fires and the proxy holds: true positives."""
    feature_alone: int
    """It fires, the proxy does not hold: false positives."""
    proxy_alone: int
    """The proxy holds, it does not fire: false negatives."""
    neither: int
    precision: Share
    recall: Share
    specificity: Share
    base: Share
    """Share of all tokens on which the proxy holds: the precision of a feature that knows nothing of it."""
    density: Share
    """Share of all tokens on which the feature fires."""
    mass: float | None
    """Of the sum of all activations, the part on tokens on which the proxy holds."""
    mean: float | None
    """Mean activation over firings."""
    strongest: float | None
    edges: list[float]
    """Of the histogram, one more than there are bars; empty where it never fired."""
    counts_with: list[int]
    """Firings on which the proxy holds, by bar."""
    counts_without: list[int]
    """Firings on which it does not."""
    expected_with: list[float]
    """Middle of the bar x `counts_with` / all firings."""
    expected_without: list[float]
    by_threshold: Threshold
    ranges: list[Range]
    """Weakest first."""
    false_negatives: list[Example]
    """Drawn uniformly from the tokens on which the proxy holds and the feature does not fire."""
    notes: list[str]


@dataclass
class Firings:
    """Tokens, as columns."""

    activation: Floats
    preactivation: Floats
    row: NDArray[np.int64]
    position: NDArray[np.int64]
    holds: NDArray[np.bool_]

    def take(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> "Firings":
        """Those at indices, or where a mask is true."""
        return Firings(*(getattr(self, name)[which] for name in COLUMNS))

    @classmethod
    def cat(cls, parts: list["Firings"]) -> "Firings":
        """The parts one after another."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS))

    def __len__(self) -> int:
        return len(self.row)


COLUMNS = ("activation", "preactivation", "row", "position", "holds")


def swept_rows(rows: Rows, tokens: int) -> int:
    """How many rows are read for so many tokens."""
    return min(max(tokens // rows.context, 1), len(rows.train))


def specificity(lens: "Lens", sae: SAE, rows: Rows, cfg: SpecificityStudy) -> Generator[Progress, None, Specificity]:
    """Hold the feature `cfg.feature` of `sae` against `cfg.proxies`, on the first rows of `rows`.

    Raises UsageError where a proxy names a text that is no single token.
    """
    proxies = Proxies(cfg.proxies, lens)
    n = swept_rows(rows, cfg.tokens_swept)
    clock, tally = Clock("scan", n * rows.context), _Tally(cfg)
    for low in range(0, n, cfg.batch_rows):
        high = min(low + cfg.batch_rows, n)
        tokens = torch.from_numpy(rows.train[low:high].astype("int64"))
        z = lens.read_z(tokens.to(lens.device), [sae.cfg.site.layer])[sae.cfg.site.layer]
        excluded = sae.excluded(z, row_starts(tokens, lens.row_start)).cpu()
        tally.add(low, *_activation(sae, cfg.feature, z), excluded, proxies.hold(tokens))
        yield clock.at(high * rows.context)
    return tally.found(lens, rows, n)


def _activation(sae: SAE, feature: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """Activation and pre-activation [b, pos] of one feature from z [b, pos, d_in]: its column alone, except that `topk` must
    see the others to know whether it is among the largest."""
    one = torch.tensor([feature], device=z.device)
    w, bias = sae.affine(one)
    preact = sae.scaled(z) @ w.T + bias
    return sae.activate(preact, one, sae.least(z))[..., 0].cpu(), preact[..., 0].cpu()


class _Tally:
    """What is kept while the rows are read."""

    def __init__(self, cfg: SpecificityStudy) -> None:
        self.cfg = cfg
        self.tokens = self.excluded = self.n_holds = 0
        self.fired: list[Firings] = []
        self.missed: list[Firings] = []
        self.n_missed = cfg.ranges * cfg.per_range
        # Each miss draws a key, and the smallest are kept: a uniform sample of all, however many there will be.
        self.keys: NDArray[np.float64] = np.empty(0)
        self.draw = np.random.default_rng(cfg.seed % 2**63)

    def add(self, first_row: int, act: Tensor, preact: Tensor, excluded: Tensor, holds: Tensor) -> None:
        """Take in rows from `first_row` on, all [b, pos]."""
        kept = ~excluded
        row, position = kept.nonzero(as_tuple=True)
        every = Firings(
            activation=act[kept].numpy(),
            preactivation=preact[kept].numpy(),
            row=row.numpy() + first_row,
            position=position.numpy(),
            holds=holds[kept].numpy(),
        )
        self.tokens += len(every)
        self.excluded += int(excluded.sum())
        self.n_holds += int(every.holds.sum())
        fires = every.activation > 0
        self.fired.append(every.take(fires))
        missed = Firings.cat([*self.missed, every.take(every.holds & ~fires)])
        keys = np.concatenate([self.keys, self.draw.random(len(missed) - len(self.keys))])
        best = np.sort(np.argsort(keys, kind="stable")[: self.n_missed])
        self.missed, self.keys = [missed.take(best)], keys[best]

    def found(self, lens: "Lens", rows: Rows, n: int) -> Specificity:
        """All that follows from what was kept."""
        cfg, fired = self.cfg, Firings.cat(self.fired)
        both = int(fired.holds.sum())
        alone, missed = len(fired) - both, self.n_holds - both
        neither = self.tokens - both - alone - missed
        edges, counts_with, counts_without = histogram(fired.activation, fired.holds, cfg.bins)
        middles = (edges[1:] + edges[:-1]) / 2
        total = float(fired.activation.sum(dtype=np.float64))
        on_proxy = float(fired.activation[fired.holds].sum(dtype=np.float64))
        shown = _Shown(lens, rows, cfg)
        words = said(cfg.proxies)
        precision, recall = share(both, both + alone), share(both, both + missed)
        return Specificity(
            summary=_summary(precision, recall, words),
            proxy=words,
            rows=n,
            tokens=self.tokens,
            excluded=self.excluded,
            both=both,
            feature_alone=alone,
            proxy_alone=missed,
            neither=neither,
            precision=precision,
            recall=recall,
            specificity=share(neither, neither + alone),
            base=share(self.n_holds, self.tokens),
            density=share(len(fired), self.tokens),
            mass=short(on_proxy / total) if total else None,
            mean=short(total / len(fired)) if len(fired) else None,
            strongest=short(float(fired.activation.max())) if len(fired) else None,
            edges=[short(edge) for edge in edges.tolist()],
            counts_with=counts_with.tolist(),
            counts_without=counts_without.tolist(),
            expected_with=_expected(middles, counts_with, len(fired)),
            expected_without=_expected(middles, counts_without, len(fired)),
            by_threshold=thresholds(edges, counts_with, counts_without, self.n_holds),
            ranges=self._ranges(fired, shown),
            false_negatives=shown.all(self.missed[0]) if self.missed else [],
            notes=_notes(len(fired), self.n_holds, self.tokens),
        )

    def _ranges(self, fired: Firings, shown: "_Shown") -> list[Range]:
        if not len(fired):
            return []
        edges = np.linspace(0, float(fired.activation.max()), self.cfg.ranges + 1)
        which = np.minimum(np.searchsorted(edges, fired.activation, side="right") - 1, self.cfg.ranges - 1)
        made = []
        for i in range(self.cfg.ranges):
            inside = fired.take(which == i)
            wrong, right = (self._drawn(inside.take(inside.holds == holds)) for holds in (False, True))
            made.append(
                Range(
                    low=short(edges[i]),
                    high=short(edges[i + 1]),
                    precision=share(int(inside.holds.sum()), len(inside)),
                    false_positives=shown.all(wrong),
                    true_positives=shown.all(right),
                )
            )
        return made

    def _drawn(self, firings: Firings) -> Firings:
        """A uniform sample, strongest first."""
        drawn = firings.take(self.draw.permutation(len(firings))[: self.cfg.per_range])
        return drawn.take(np.argsort(-drawn.activation, kind="stable"))


def histogram(values: Floats, holds: NDArray[np.bool_], bins: int) -> tuple[NDArray[np.float64], Counts, Counts]:
    """Edges [bins + 1] of equal width from 0 to the largest value, and counts [bins] where the proxy holds and where not.

    edges[i] <= value < edges[i + 1], the largest in the last; all empty without values.
    """
    if not len(values):
        none = np.empty(0, np.int64)
        return np.empty(0), none, none
    edges = np.linspace(0, float(values.max()), bins + 1)
    which = np.minimum(np.searchsorted(edges, values, side="right") - 1, bins - 1)
    return edges, np.bincount(which[holds], minlength=bins), np.bincount(which[~holds], minlength=bins)


def thresholds(edges: NDArray[np.float64], with_proxy: Counts, without: Counts, n_holds: int) -> Threshold:
    """Precision and recall of firings in each bar and all above, from the histogram's counts, which are exact there."""
    right = with_proxy[::-1].cumsum()[::-1].tolist()
    wrong = without[::-1].cumsum()[::-1].tolist()
    precision = [share(a, a + b) for a, b in zip(right, wrong, strict=True)]
    recall = [share(a, n_holds) for a in right]
    return Threshold(
        activation=[short(edge) for edge in edges[:-1].tolist()],
        precision=[one.value for one in precision],
        precision_low=[one.low for one in precision],
        precision_high=[one.high for one in precision],
        recall=[one.value for one in recall],
        recall_low=[one.low for one in recall],
        recall_high=[one.high for one in recall],
    )


def _expected(middles: NDArray[np.float64], counts: Counts, total: int) -> list[float]:
    return [short(value / total) for value in (middles * counts).tolist()] if total else []


def _summary(precision: Share, recall: Share, words: str) -> str:
    if precision.value is None:
        return f"it never fired; proxy: {words}"
    kept = "the proxy never held" if recall.value is None else f"recall {recall.value:.1%}"
    return f"precision {precision.value:.1%}, {kept}; proxy: {words}"


def _notes(n_fired: int, n_holds: int, tokens: int) -> list[str]:
    notes = []
    if not n_fired:
        notes.append("The feature never fired on these tokens, so it has no precision here.")
    if not n_holds:
        notes.append("The proxy held on none of these tokens, so there is nothing to recall; take more tokens, or another proxy.")
    if n_holds == tokens:
        notes.append("The proxy held on every token, so it tells nothing apart.")
    return notes


class _Shown:
    """Examples with their text."""

    def __init__(self, lens: "Lens", rows: Rows, cfg: SpecificityStudy) -> None:
        self.lens, self.rows, self.window = lens, rows, min(cfg.window, rows.context)

    def all(self, firings: Firings) -> list[Example]:
        """An example of each."""
        return [self._one(firings, i) for i in range(len(firings))]

    def _one(self, firings: Firings, i: int) -> Example:
        row, position = int(firings.row[i]), int(firings.position[i])
        start = min(max(position - 3 * self.window // 4, 0), self.rows.context - self.window)
        texts = self.lens.token_texts(self.rows.train[row, start : start + self.window].tolist())
        return Example(
            row=row,
            position=position,
            activation=short(float(firings.activation[i])),
            preactivation=short(float(firings.preactivation[i])),
            texts=texts,
            at=position - start,
        )
