"""Numbers, token texts and painted examples as HTML. Everything is escaped here; nothing carries a style, so a strict CSP holds.

Colours come from classes: `a1`..`a15` activation, `p1`..`p15` positive and `n1`..`n15` negative DFA.
"""

import json
import math
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from itertools import groupby
from operator import attrgetter, sub
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from server.markup import made, token_text, visible
from server.store.features import FeatureExample, columns

NARROW = "\N{NARROW NO-BREAK SPACE}"
LEVELS = 15
FAINTEST = 0.03
"""A DFA below this share of the example's largest is not painted; its number is still there."""
FAR_SOURCE = 5
"""A source painted at this level or above stays in view however short the context is."""
KEPT_LIVE = 2000
"""Entries of typed text that its page keeps: all that could be seen of thousands."""


# --- numbers -----------------------------------------------------------------


def num(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, with a real minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if digits > 1 and 1e-4 <= abs(value) < 9.9:  # most numbers of a page: what follows says the same, more slowly
        return f"{value:#.{digits}g}" if value > 0 else f"−{-value:#.{digits}g}"
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
    if n is None:
        return "–"
    whole = round(n)
    return str(whole) if 0 <= whole < 1000 else f"{whole:,}".replace(",", NARROW).replace("-", "−")


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


def size(n: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= of:
            return f"{n / of:,.1f} {unit}"
    return f"{n / 1e3:,.1f} kB"


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


# --- painted examples ---


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
    """The example's text: activation as warmth, DFA as a bar beneath, the destination framed. Sources that matter stay in view
    however far back they are."""
    return made(_painted(example, paint, _given([example], paint.head)[0])[0])


def by_band(examples: Iterable[FeatureExample]) -> list[tuple[int, list[FeatureExample]]]:
    """(band, its examples), of examples in the order of bands."""
    return [(band, list(those)) for band, those in groupby(examples, attrgetter("band"))]


def example_items(examples: Sequence[FeatureExample], paint: Paint, index: int) -> dict[tuple[int, int], Markup]:
    """Stored examples of the feature `index` on its page by (band, rank), made at once: they are twenty and more."""
    head = "" if paint.head is None else f"&amp;head={paint.head}"
    return {
        (example.band, example.rank): _item(
            example,
            paint,
            given,
            f"{index}/examples/{example.band}/{example.rank}",
            f"{index}/components?band={example.band}&amp;rank={example.rank}{head}",
            f' id="example-{example.band}-{example.rank}"',
        )
        for example, given in zip(examples, _given(examples, paint.head), strict=True)
    }


def example_item(example: FeatureExample, paint: Paint, sources: str, components: str) -> Markup:
    """An example that stands alone, with the sum of its DFA; `sources` and `components` are addresses that split it."""
    return _item(example, paint, _given([example], paint.head)[0], str(escape(sources)), str(escape(components)))


def _item(example: FeatureExample, paint: Paint, given: "_Given", sources: str, components: str, anchor: str = "") -> Markup:
    """`data-at` has where the marked tokens are, each less the one before it. Their numbers come from the address `sources`
    when they are looked at, or are in `data-numbers` where there is no address: typed text, which is not stored."""
    text, marked = _painted(example, paint, given)
    numbers = "" if sources else f' data-numbers="{escape(json.dumps(_numbers(example), separators=(",", ":")))}"'
    whole, places = " whole" if paint.context is None else "", " ".join(map(str, map(sub, marked, [0, *marked])))
    links = f'<a class="split" href="{sources}">sources</a> ' if sources else ""
    return made(
        f'<li class="example"{anchor}><b class="act">{num(example.act)}</b>'
        f'<p class="text{whole}" tabindex="0" data-dest="{example.dest}" data-at="{places}"{numbers}>{text}</p>'
        f'<div class="sums">{_sums(example, given.by_head, links, components)}</div></li>\n'
    )


class _Given(NamedTuple):
    """What the sources of an example gave to it."""

    sources: list[int]
    """Those that gave anything, from the first."""
    levels: dict[int, int]
    """How strongly each is painted, -15 to 15; those too faint are left out."""
    by_head: list[float]
    """DFA of each head, sources summed."""


def _given(examples: Sequence[FeatureExample], head: int | None) -> list[_Given]:
    """For each example. They are taken together, since numpy takes its time by the call; `head` paints what it gave alone, to the
    scale of all."""
    if not examples:
        return []
    n, counts = len(examples), [len(example.dfa) for example in examples]
    src, of_head, value = columns([example.dfa for example in examples])
    example = np.repeat(np.arange(n), counts)

    heads = max(len(one.dropped) for one in examples) or 1
    listed = np.bincount(example * heads + of_head, value, n * heads).reshape(n, heads).tolist()
    far = int(src.max(initial=0)) + 1
    of_source = example * far + src  # which of the sources of all examples it is: they are few, so counting finds those there are
    keys = np.flatnonzero(np.bincount(of_source, minlength=1))
    place = np.searchsorted(keys, of_source)
    whole = np.bincount(place, value, len(keys))
    shown = whole if head is None else np.bincount(place, np.where(of_head == head, value, 0.0), len(keys))

    owner, position = np.divmod(keys, far)
    scale = np.zeros(n)
    np.maximum.at(scale, owner, np.abs(whole))
    size, full = np.abs(shown), np.where(scale > 0, scale, 1.0)[owner]
    level = np.where(size >= FAINTEST * full, np.minimum(LEVELS, np.ceil(size * LEVELS / full - 1e-9)), 0.0)
    signed_level, positions = np.copysign(level, shown).astype(int).tolist(), position.tolist()
    ends = np.searchsorted(owner, np.arange(n + 1)).tolist()
    return [
        _Given(
            positions[low:high],
            {at: one for at, one in zip(positions[low:high], signed_level[low:high], strict=True) if one},
            [a + b + c for a, b, c in zip(one.dropped, one.before, sums, strict=False)],
        )
        for one, sums, low, high in zip(examples, listed, ends, ends[1:], strict=False)
    ]


def _sums(example: FeatureExample, by_head: Sequence[float], links: str, components: str) -> str:
    """The sum that the example's DFA makes, and ways to split it; of an imported one, what there is instead."""
    if example.attributed == "none":
        return '<span class="identity">no DFA was imported</span>'
    if example.attributed == "heads summed":
        rest = f"{fixed(example.bias)} of {fixed(example.act)} is not in it"
        return f'<span class="identity">DFA of all heads together; {rest}</span>'
    sign = "−" if example.bias < 0 else "+"
    return (
        f'<div class="tops">{links}<a class="split" href="{components}">components</a>{head_strip(by_head)}</div>'
        f'<span class="identity">{fixed(example.dfa_sum)} {sign} {fixed(abs(example.bias))} = '
        f"<b>{fixed(example.preact)}</b> <small>gap {num(example.gap, 1)}</small></span>"
    )


def _numbers(example: FeatureExample) -> dict[str, Any]:
    """What the address of a stored example answers, as far as the panel shows it."""
    dfa = [{"src": src, "head": head, "value": float(f"{value:.5g}")} for src, head, value in example.dfa[:KEPT_LIVE]]
    return {
        "acts": {at: float(f"{act:.5g}") for at, act in example.acts.items()},
        "dfa": dfa,
        "dropped": [0] * len(example.dropped),
    }


def _painted(example: FeatureExample, paint: Paint, given: _Given) -> tuple[str, list[int]]:
    """The text as HTML, and the positions of its marked tokens: `b` is the destination, `u` any other. What stands between them
    is plain text, so that a page of twenty examples stays small."""
    levels = given.levels
    start, dest, texts, acts = example.start, example.dest, example.texts, example.acts
    numbered, found = {dest, *given.sources, *acts}, ""
    if paint.mark is not None:
        found = _bare(paint.mark)
        numbered.update(start + at for at, text in enumerate(texts) if _bare(text) == found)
    order = sorted(numbered)
    marked: list[int] = []
    parts: list[str] = []
    warm = LEVELS / paint.scale if paint.scale > 0 else 0.0
    in_bytes = "<0x" in "".join(texts)
    last = start
    for low, high in _in_view(example, levels, paint.context):
        if low > last:
            parts.append(f'<i class="gap" title="{low - last} more">⋯</i>')
        here = order[bisect_left(order, low) : bisect_left(order, high)]
        shown = texts[low - start : high - start]
        pieces = _joined(shown, {position - low for position in here}) if in_bytes else list(map(_plain, shown))
        for position in here:
            raw = texts[position - start]
            space, word, tail = _split(raw)
            warmth = min(LEVELS, math.ceil(acts[position] * warm - 1e-9)) if position in acts else 0
            opened = _opened(warmth, levels.get(position, 0), bool(found) and _bare(raw) == found)
            tag = "b" if position == dest else "u"
            pieces[position - low] = f"{space}<{tag}{opened}>{word}</{tag}>{tail}"
        parts += pieces
        marked += here
        last = high
    if start + len(texts) > last:
        parts.append(f'<i class="gap" title="{start + len(texts) - last} more">⋯</i>')
    return "".join(parts), marked


@cache
def _opened(warmth: int, given: int, found: bool) -> str:
    """The attributes of a marked token: 0 to 15 of activation, -15 to 15 of DFA."""
    classes = [f"a{warmth}"] if warmth else []
    classes += [f"{'p' if given > 0 else 'n'}{abs(given)}"] if given else []
    classes += ["found"] if found else []
    if not classes:
        return ""
    return f" class={classes[0]}" if len(classes) == 1 else f' class="{" ".join(classes)}"'


def _bare(text: str) -> str:
    return (text.strip(" ") or text).casefold()


def _in_view(example: FeatureExample, levels: Mapping[int, int], context: int | None) -> Sequence[tuple[int, int]]:
    """The stretches of positions that are shown, each from its first to before its end."""
    start, end = example.start, example.start + len(example.texts)
    if context is None:
        return [(start, end)]
    near = [(max(start, example.dest - context), min(end, example.dest + context + 1))]
    near += [(max(start, src - 2), min(end, src + 2)) for src, strength in levels.items() if abs(strength) >= FAR_SOURCE]
    shown: list[tuple[int, int]] = []
    for low, high in sorted(near):
        # An ellipsis for one or two tokens would be no shorter than the tokens.
        if shown and low - shown[-1][1] <= 2:
            shown[-1] = (shown[-1][0], max(high, shown[-1][1]))
        else:
            shown.append((low, high))
    if shown[0][0] - start <= 2:
        shown[0] = (start, shown[0][1])
    return shown


@lru_cache(maxsize=65536)
def _plain(raw: str) -> str:
    # The sign of a line end stays inside the token; the line itself ends after it.
    return f"{token_text(raw)}<wbr>" if "\n" in raw else str(token_text(raw))


_BYTES = re.compile("(?:<0x([0-9A-F]{2})>)+")


def _joined(texts: Sequence[str], apart: Collection[int]) -> list[str]:
    """A piece of HTML for each token as if it were plain. Those that hold a character only together are joined in the first one's
    piece, and the others' are empty; not with the tokens at `apart`. The bytes of a part of one are shown as bytes."""
    pieces = [""] * len(texts)
    at = 0
    while at < len(texts):
        data, end, character = b"", at, ""
        while not character and end < len(texts) and end not in apart and len(data) < 4 and _BYTES.fullmatch(texts[end]):
            data += bytes.fromhex(re.sub("<0x|>", "", texts[end]))
            end += 1
            character = data.decode(errors="ignore") if _is_whole(data) else ""
        if character and end - at > 1:
            told, shown = escape("".join(texts[at:end])), escape(visible(character))
            pieces[at] = f'<i class="joined" title="{end - at} tokens: {told}">{shown}</i>'
            at = end
        else:
            pieces[at] = _plain(texts[at])
            at += 1
    return pieces


def _is_whole(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


@lru_cache(maxsize=65536)
def _split(raw: str) -> tuple[str, str, str]:
    """(leading space, word, line end). The space stands outside, so that a mark hugs its word and lines still break at spaces."""
    text = str(token_text(raw))
    space = " " if text.startswith(" ") and len(text) > 1 else ""
    return space, text[1:] if space else text, "<wbr>" if "\n" in raw else ""


def head_strip(sums: Sequence[float]) -> str:
    """A bar per head: the DFA of an example, sources summed, drawn up for positive and down for negative."""
    sizes = [abs(value) for value in sums]
    top = max(sizes, default=0.0)
    steps = 20 / (top or 1.0)
    up = down = ""
    for head, value in enumerate(sums):
        size = round(steps * value)
        if size > 0:
            up += f"M{12 * head + 6} 22v-{size}"
        elif size < 0:
            down += f"M{12 * head + 6} 22v{-size}"
    bars = (f'<path class="pos" d="{up}"/>' if up else "") + (f'<path class="neg" d="{down}"/>' if down else "")
    most = sizes.index(top) if sizes else 0
    said = f"Most by head {most}: {signed(sums[most])}" if sums else "No heads"
    return f'<svg class="strip" role="img" viewBox="0 0 {12 * len(sums)} 44"><title>{said}</title>{bars}</svg>'
