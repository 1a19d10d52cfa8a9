"""Numbers, token texts and painted examples as HTML. Everything is escaped here; nothing carries a style, so a strict CSP holds.

Colours come from classes: `a1`..`a15` activation, `p1`..`p15` positive and `n1`..`n15` negative DFA.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

from markupsafe import Markup, escape

from server.store.features import FeatureExample

NARROW = "\N{NARROW NO-BREAK SPACE}"
LEVELS = 15
FAINTEST = 0.03
"""A DFA below this share of the example's largest is not painted; its number is still there."""
FAR_SOURCE = 5
"""A source painted at this level or above stays in view however short the context is."""


# --- numbers -----------------------------------------------------------------


def num(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, with a real minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:.{max(0, digits - 1 - size)}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """`num` with a plus where the value is positive."""
    return ("+" if value is not None and value > 0 else "") + num(value, digits)


def fixed(value: float | None, places: int = 2) -> str:
    """`value` to so many decimal places, so that a column lines up."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{places}f}".replace("-", "−")


def percent(share: float | None, digits: int = 3) -> str:
    """A share as a percentage."""
    return "–" if share is None or not math.isfinite(share) else f"{num(100 * share, digits)}{NARROW}%"


def count(n: int | float | None) -> str:
    """A whole number with its thousands set apart."""
    return "–" if n is None else f"{round(n):,}".replace(",", NARROW).replace("-", "−")


def duration(seconds: float | None) -> str:
    """About how long, in the two largest units."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(at: datetime | None) -> str:
    """A time in UTC. SQLite gives times without their zone; ours are all in UTC."""
    return "–" if at is None else f"{at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def clock(at: datetime) -> str:
    """The time of day in UTC."""
    return f"{at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC):%H:%M:%S}"


def level(value: float, scale: float) -> int:
    """0 to 15: how strongly `value` is painted when `scale` is painted fully."""
    if scale <= 0 or value <= 0:
        return 0
    return min(LEVELS, max(1, math.ceil(LEVELS * value / scale)))


# --- token texts -------------------------------------------------------------

_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x00": "␀"}


@lru_cache(maxsize=65536)
def token_text(text: str) -> Markup:
    """A token as people see it: escaped, and no character invisible or able to turn the text around it."""
    return _visible(text).replace("↵", Markup('<i class="nl">↵</i>'))


@lru_cache(maxsize=65536)
def token_chip(text: str) -> Markup:
    """A token standing alone, its spaces made visible."""
    spaced = _visible(text).replace(" ", Markup('<i class="sp">·</i>')).replace("↵", Markup('<i class="nl">↵</i>'))
    return Markup('<span class="chip">{}</span>').format(spaced)


def visible(text: str) -> str:
    """`text` with no character invisible, or able to turn the text around it."""
    return "".join(_SIGNS.get(c) or (f"⟨{ord(c):X}⟩" if _hidden(c) else c) for c in text)


def _visible(text: str) -> Markup:
    return escape(visible(text))


def _hidden(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


JOINERS = "\u200c\u200d"


def written(text: str) -> Markup:
    """What a person wrote, as one piece that cannot turn the text around it: escaped, and no character of it invisible. Only
    the joiners of emoji and of scripts that need them stay as they are."""
    ends = range(1, len(text) - 1)
    parts = []
    for at, c in enumerate(text):
        joins = c in JOINERS and at in ends and not text[at - 1].isascii() and not text[at + 1].isascii()
        hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n" and not joins
        parts.append(f"⟨{ord(c):X}⟩" if hidden else c)
    return Markup("<bdi>{}</bdi>").format("".join(parts))


class Paint(NamedTuple):
    """How an example is shown."""

    scale: float
    """The activation painted fully: the feature's maximum."""
    head: int | None = None
    """Paint this head's DFA alone."""
    context: int | None = 16
    """Tokens on each side of the destination; None shows the whole window."""
    mark: str | None = None
    """A token that was looked for; it is marked wherever it stands."""


def example_tokens(example: FeatureExample, paint: Paint) -> Markup:
    """The example's text: activation as warmth, DFA as a bar beneath, the destination framed.

    A token with numbers carries them for the panel: `data-a` activation, `data-d` its DFA as `head:value` pairs. Sources
    that matter stay in view however far back they are.
    """
    by_source, whole, entries = _by_source(example, paint.head)
    scale = max(map(abs, whole.values()), default=0.0)
    marked = None if paint.mark is None else _bare(paint.mark)
    levels = {src: level(abs(v), scale) if abs(v) >= FAINTEST * scale else 0 for src, v in by_source.items()}
    end = example.start + len(example.texts)
    shown = _in_view(example, levels, paint.context, end)
    parts: list[str] = []
    last = example.start - 1
    for position in shown:
        if position - last > 1:
            parts.append(_left_out(position - last - 1))
        last = position
        raw = example.texts[position - example.start]
        found = marked is not None and _bare(raw) == marked
        if position in entries or position in example.acts or position == example.dest or found:
            strength, dfa = levels.get(position, 0), by_source.get(position, 0.0)
            parts.append(_token(example, position, raw, found, strength, dfa, entries.get(position), paint.scale))
        else:
            parts.append(_plain(raw))
    if end - last > 1:
        parts.append(_left_out(end - last - 1))
    return Markup("".join(parts))  # noqa: S704 - every part is escaped above


def _bare(text: str) -> str:
    return (text.strip(" ") or text).casefold()


def _by_source(example: FeatureExample, head: int | None) -> tuple[dict[int, float], dict[int, float], dict[int, list[str]]]:
    """By source: DFA of `head`, of all heads, and the entries as `head:value`."""
    whole: dict[int, float] = {}
    entries: dict[int, list[str]] = {}
    for entry in example.dfa:
        src = entry.src
        whole[src] = whole.get(src, 0.0) + entry.value
        entries.setdefault(src, []).append(f"{entry.head}:{entry.value:.4g}")
    if head is None:
        return whole, whole, entries
    sums: dict[int, float] = {}
    for entry in example.dfa:
        if entry.head == head:
            sums[entry.src] = sums.get(entry.src, 0.0) + entry.value
    return sums, whole, entries


def _in_view(example: FeatureExample, levels: Mapping[int, int], context: int | None, end: int) -> Sequence[int]:
    if context is None:
        return range(example.start, end)
    near = set(range(max(example.start, example.dest - context), min(end, example.dest + context + 1)))
    for src, strength in levels.items():
        if strength >= FAR_SOURCE:
            near.update(range(max(example.start, src - 2), min(end, src + 2)))
    shown: list[int] = []
    for position in sorted(near):
        # An ellipsis for one or two tokens would be no shorter than the tokens.
        if shown and 1 < position - shown[-1] <= 3:
            shown.extend(range(shown[-1] + 1, position))
        shown.append(position)
    return shown


def _left_out(n: int) -> str:
    return f'<i class="gap" title="{n} more">⋯</i>'


@lru_cache(maxsize=65536)
def _plain(raw: str) -> str:
    # The sign of a line end stays inside the token; the line itself ends after it.
    return f"{token_text(raw)}<wbr>" if "\n" in raw else str(token_text(raw))


@lru_cache(maxsize=65536)
def _split(raw: str) -> tuple[str, str, str]:
    """(leading space, word, line end). The space stands outside, so that a mark hugs its word and lines still break at spaces."""
    text = str(token_text(raw))
    space = " " if text.startswith(" ") and len(text) > 1 else ""
    return space, text[1:] if space else text, "<wbr>" if "\n" in raw else ""


def _token(
    example: FeatureExample,
    position: int,
    raw: str,
    found: bool,
    strength: int,
    dfa: float,
    entries: Sequence[str] | None,
    scale: float,
) -> str:
    act = example.acts.get(position, 0.0)
    classes = "t"
    if act > 0:
        classes += f" a{level(act, scale)}"
    if strength:
        classes += f" {'p' if dfa > 0 else 'n'}{strength}"
    if found:
        classes += " found"
    if position == example.dest:
        classes += " dest"
    data = f' data-a="{act:.4g}"' if act > 0 else ""
    if entries:
        data += f' data-d="{" ".join(entries)}"'
    space, word, tail = _split(raw)
    return f'{space}<span class="{classes}" data-p="{position}"{data}>{word}</span>{tail}'


def head_strip(example: FeatureExample) -> Markup:
    """A bar per head: the DFA of this example, sources summed, drawn up for positive and down for negative."""
    sums = example.by_head
    top = max(map(abs, sums), default=0.0) or 1.0
    width = 6 * len(sums)
    drawn = {"pos": "", "neg": ""}
    for head, value in enumerate(sums):
        height = max(0.5, 10 * abs(value) / top)
        drawn["pos" if value > 0 else "neg"] += f"M{6 * head + 1} 11h4v{-height if value > 0 else height:.1f}h-4"
    bars = "".join(f'<path class="{sign}" d="{path}"/>' for sign, path in drawn.items() if path)
    label = ", ".join(f"head {head} {signed(value, 2)}" for head, value in enumerate(sums))
    return Markup(  # noqa: S704 - numbers only
        f'<svg class="strip" role="img" viewBox="0 0 {width} 22" width="{width}" height="22"><title>DFA by head: {label}</title>'
        f'<path class="axis" d="M0 11h{width}"/>{bars}</svg>'
    )
