"""What the panels of a page draw and say, made from what is stored: bars, curves, and numbers with their sentences."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from markupsafe import Markup, escape

from server.charts import Bar, Curve, Line, Point, Series, share_bar, signed_bar
from server.markup import made, token_chip
from server.rendering import Paint, num, percent, signed
from server.store.features import HeadShare


class HasWeight(Protocol):
    """A token and how strongly it is moved."""

    @property
    def text(self) -> str: ...
    @property
    def value(self) -> float: ...


def whole(scale: float) -> Paint:
    """An example shown whole, with the activation `scale` painted fully."""
    return Paint(scale, context=None)


def head_rows(heads: Sequence[HeadShare], chosen: int | None, paints: str) -> Markup:
    """The rows of a feature's heads; `paints` is the address that ends in the head to paint by. Made at once: they are many."""
    norm_top, dfa_top = max(head.norm_share for head in heads), heads_top(heads)
    return made(
        "\n".join(
            f'<tr{_CHOSEN if head.head == chosen else ""}><th scope="row"><a href="{escape(paints)}{head.head}" '
            f'data-head="{head.head}">{head.head}</a><td>{share_bar(head.norm_share, norm_top)}<td class="n">'
            f'{percent(head.norm_share, 2)}<td>{signed_bar(head.dfa, head.dfa_std, dfa_top)}<td class="n" '
            f'title="± {num(head.dfa_std)}; {percent(head.dfa_share)} of all heads\' |mean|">{signed(head.dfa)}'
            for head in heads
        )
    )


_CHOSEN = ' class="chosen"'


def token_rows(tokens: Sequence[HasWeight], kind: str) -> Markup:
    """The rows of tokens and their logit weights; `kind` is `pos` or `neg`."""
    return made("\n".join(f'<tr><td>{token_chip(token.text)}<td class="n {kind}">{signed(token.value)}' for token in tokens))


def heads_top(heads: Sequence[HeadShare]) -> float:
    """The largest |mean DFA| with its spread, so that every head's bar is drawn to one scale."""
    return max((abs(head.dfa) + head.dfa_std for head in heads if math.isfinite(head.dfa)), default=0.0)


EVIDENCE = {
    "induction": "from tokens that followed an earlier copy of the destination",
    "previous": "from the token right before",
    "current": "from the destination itself",
    "duplicate": "from earlier copies of the destination",
    "near": "from at most 10 tokens back",
    "far": "from more than 32 tokens back",
    "top_share": "from the one strongest source",
    "row_start": "of everything, row starts included, from row starts",
    "next": "of the strongest examples read one and the same token by induction",
    "next_bands": "of the weaker examples have it after an earlier copy of the destination",
    "next_follows": "of the strongest examples have it as the next token of the text",
    "positional": "of all activation would have to move if the position in the row did not matter",
}
"""What the detectors' shares of positive DFA mean, in words."""
OTHER_EVIDENCE = {
    "distance": "tokens back on average",
    "source_logit": "standard deviations by which it lifts the strongest source's own token",
    "next_logit": "standard deviations by which it lifts the token that is next by induction",
    "examples": "examples looked at",
}


def evidence_lines(evidence: Mapping[str, float]) -> list[tuple[str, str]]:
    """The numbers behind a family as (how much, of what): shares first, the largest first, with what chance would give."""
    lines = []
    for name in sorted((name for name in EVIDENCE if name in evidence), key=lambda name: -evidence[name]):
        chance = evidence.get(f"{name}_chance")
        by_chance = "" if chance is None else f"; by chance {percent(chance, 2)}"
        lines.append((percent(evidence[name], 2), EVIDENCE[name] + by_chance))
    lines += [(num(evidence[name], 2), words) for name, words in OTHER_EVIDENCE.items() if name in evidence]
    known = EVIDENCE.keys() | OTHER_EVIDENCE.keys() | {f"{name}_chance" for name in EVIDENCE}
    return lines + [(str(value), name.replace("_", " ")) for name, value in sorted(evidence.items()) if name not in known]


CURVES = {
    "loss": ("Loss", "Mean squared error with the auxiliary loss, by training step."),
    "fvu": ("Unexplained variance", "Fraction of the variance of z that the SAE does not explain, by training step."),
    "l0": ("L0", "Mean number of active features per token, by training step."),
    "dead": ("Dead features", "Share of features that have not fired for long, by training step."),
}


class Step(Protocol):
    """A point of a job's curves."""

    @property
    def step(self) -> int: ...
    @property
    def values(self) -> Mapping[str, float]: ...


def curves(points: Sequence[Step]) -> list[tuple[str, str, Curve]]:
    """The curves that the points hold, as (title, description, line), in the order of `CURVES`."""
    found = []
    for name, (title, words) in CURVES.items():
        line = [(point.step, float(point.values[name])) for point in points if name in point.values]
        if line:
            found.append((title, words, Curve(name, line)))
    return found


class HasCount(Protocol):
    """So many features have `key` in common."""

    @property
    def key(self) -> int | str: ...
    @property
    def features(self) -> int: ...


class HasRange(Protocol):
    """So many values lie between `low` and `high`."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def count(self) -> int: ...


def head_bars(counts: Sequence[HasCount], sae: str) -> list[Bar]:
    """A bar per head that leads to the features it leads."""
    return [Bar(str(entry.key), entry.features, f"{sae}?head={entry.key}&leads=true#features") for entry in counts]


def plain_bars(values: Sequence[float | None]) -> list[Bar]:
    """A bar per head; none stands where the value is not known."""
    return [Bar(str(head), value) for head, value in enumerate(values) if value is not None]


def position_bars(parts: Sequence[Mapping[str, Any]], name: str) -> list[Bar]:
    """A bar per group of positions in the row, for the measure `name`."""
    return [Bar(_positions(part), part[name]) for part in parts if part.get(name) is not None]


class HasFirings(Protocol):
    """So many firings on so many tokens, at the positions `low` to `high`."""

    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...
    @property
    def firings(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class Cited(Protocol):
    """An SAE as a citation names it."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def sha256(self) -> str: ...


def bibtex(title: str, address: str, sae: Cited, harvest: int | None, made: datetime | None, version: str) -> str:
    """A page as a BibTeX entry: whoever has the SAE and the harvest can see the same numbers again."""
    key = re.sub(r"[^a-z0-9]+", "-", f"headscope-{sae.name}-{title}".lower()).strip("-")
    note = f"SAE {sae.name} of {sae.model}, sha256 {sae.sha256}" + (f", harvest {harvest}" if harvest is not None else "")
    fields = {
        "title": f"{{{_tex(title)}}}",
        "howpublished": f"\\url{{{address}}}",
        "year": str(made.year) if made else None,
        "month": str(made.month) if made else None,
        "note": f"{_tex(note)}. Headscope {version}",
    }
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{lines}}}"


def _tex(text: str) -> str:
    """Text with what TeX reads as a command made harmless."""
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "/")).replace("~", "-").replace("^", "-")


FAMILY_MARKS = {
    "induction": 0,
    "token by induction": 0,
    "previous token": 1,
    "duplicate token": 2,
    "suppression": 4,
    "local": 5,
    "long-range": 3,
}
"""Shapes (`charts.MARKS`) of the families that a map of heads marks; two of one kind share one."""
MARKED_FAMILIES = ("induction", "previous token", "duplicate token", "long-range", "suppression", "local")


def family_mark(family: int | str) -> int | None:
    """The shape of a family."""
    return FAMILY_MARKS.get(str(family))


def family_key() -> list[Series]:
    """The shapes and what they mean."""
    return [Series(name, FAMILY_MARKS[name], ()) for name in MARKED_FAMILIES]


def cosine_bars(counts: Sequence[int]) -> list[Bar]:
    """A bar per step of cosine, from 0 to 1."""
    return [Bar(f"{num(i / len(counts), 2)} to {num((i + 1) / len(counts), 2)}", n) for i, n in enumerate(counts)]


def cosine_ticks(counts: Sequence[int]) -> list[tuple[float, str]]:
    """Labels at quarters."""
    return [(len(counts) * part, num(part, 2)) for part in (0, 0.25, 0.5, 0.75, 1)]


def spectra(spectrum: Mapping[str, Any]) -> list[Line]:
    """The singular values of the heads with the lowest, middle and highest effective rank."""
    ranks = spectrum["effective"]
    order = sorted((head for head, rank in enumerate(ranks) if rank is not None), key=lambda head: ranks[head])
    shown = list(dict.fromkeys(order[i] for i in (0, len(order) // 2, len(order) - 1))) if order else []
    return [
        Line(f"head {head}", mark, [Point(i + 1, value) for i, value in enumerate(spectrum["singular"][head])])
        for mark, head in enumerate(shown)
    ]


class HasValue(Protocol):
    """A bar of whole numbers: `low` <= ... < `high`."""

    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...
    @property
    def value(self) -> float: ...


def span_bars(spans: Sequence[HasValue]) -> list[Bar]:
    """A bar per group of distances."""
    return [Bar(_range(span.low, span.high - 1), span.value) for span in spans]


def rate_bars(buckets: Sequence[HasFirings]) -> list[Bar]:
    """A bar per group of positions: percent of its tokens that fire."""
    return [Bar(_range(one.low, one.high), 100 * one.firings / one.tokens) for one in buckets if one.tokens]


def distance_bars(sample: Mapping[str, Any]) -> list[Bar]:
    """A bar per group of distances: percent of |DFA| that comes from there."""
    return [Bar(_range(low, beyond - 1), 100 * share) for low, beyond, share in sample["distance"]]


def _positions(part: Mapping[str, Any]) -> str:
    return _range(part["low"], part["high"])


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


class Measure(NamedTuple):
    """A number of an evaluation, as a page shows it."""

    name: str
    value: str
    words: str
    """What it means."""


MEASURES: tuple[tuple[str, str, Callable[[float | None], str], str], ...] = (
    ("cosine", "cosine", num, "Mean cosine of z and its reconstruction: 1 if all directions are right."),
    ("mse", "squared error", num, "Mean of |z − ẑ|² over tokens: summed, not averaged, over the coordinates of z."),
    ("norm_ratio", "|ẑ| / |z|", num, "Mean length of the reconstruction over that of z."),
    (
        "gamma", "gamma", num,
        "Σ|ẑ|² / Σ ẑ·z: the factor by which ẑ would have to be divided to fit best. Below 1 the SAE shrinks what it rebuilds.",
    ),
    ("gamma_centred", "gamma, centred", num, "The same with the mean of z taken from both: b_dec gives the mean for nothing."),
    ("l1", "L1", num, "Sum of a token's activations, on average."),
    ("dense_1", "on > 1 %", percent, "Share of features that fire on more than 1 % of tokens."),
    ("dense_10", "on > 10 %", percent, "Share of features that fire on more than 10 % of tokens: seldom readable ones."),
    (
        "decoder_cosine", "decoder neighbour", num,
        "Mean over live features of the cosine with the nearest other decoder direction: high where features come twice.",
    ),
    ("encoder_cosine", "encoder neighbour", num, "The same of encoder directions."),
    (
        "encoder_decoder_cosine", "encoder · decoder", num,
        "Mean over live features of the cosine of their encoder and decoder direction: low where reading and writing differ.",
    ),
)  # fmt: skip
"""Measures of reconstruction that have no sentence of their own: key, name, form, meaning."""


def fit_measures(fit: Mapping[str, Any]) -> list[Measure]:
    """Those of `MEASURES` that were measured, then the density of the median feature."""
    found = [Measure(name, form(fit[key]), words) for key, name, form, words in MEASURES if fit.get(key) is not None]
    middle = next((q["density"] for q in fit.get("density_quantiles") or [] if q["share"] == 0.5), None)
    if middle is not None:
        spread = ", ".join(f"{percent(q['share'])} of features up to {percent(q['density'])}" for q in fit["density_quantiles"])
        found.append(Measure("median density", percent(middle), f"Half the features fire on fewer tokens. {spread}."))
    return found


def density_bars(bins: Sequence[HasRange]) -> list[Bar]:
    """The bars of the density histogram."""
    return [Bar(f"{percent(b.low)} to {percent(b.high)} of tokens", b.count) for b in bins]


def density_ticks(bins: Sequence[HasRange]) -> list[tuple[float, str]]:
    """A label at every second power of ten."""
    return [(at, percent(bins[at].low if at < len(bins) else bins[-1].high, 1)) for at in range(0, len(bins) + 1, 6)]
