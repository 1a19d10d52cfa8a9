"""Lines of the feature table as HTML, each a string made at once: a page has fifty to two hundred of a dozen cells, and a
template takes three times as long over them. What is text is escaped here or by `markup`; the addresses come escaped."""

from collections.abc import Iterable
from functools import lru_cache

from markupsafe import Markup, escape

from server.charts import share_bar
from server.markup import made, token_chip, token_text, visible, written
from server.rendering import num, percent, signed
from server.store.features import FeatureRow, Snippet

BAR = 44
"""Pixels of a bar in a cell."""


def feature_lines(rows: Iterable[FeatureRow], features: str, chosen: str, head: int | None, no_family: str) -> Markup:
    """A line of each feature. `features` is the address that indices stand behind, `chosen` what stands behind an index, and
    `head` the one whose shares are shown; None for each feature's own leading heads. `no_family` stands where one has none."""
    return made("".join(_line(row, features, chosen, head, no_family) for row in rows))


def _line(row: FeatureRow, features: str, chosen: str, head: int | None, no_family: str) -> str:
    alive = row.n_fired > 0
    strongest, mean, fires = (num(row.max_act), num(row.mean_act), percent(row.density, 2)) if alive else ("", "", "")
    said = f' title="{escape(" ".join(visible(row.verdict).split()))}"' if row.verdict else ""
    family = escape(row.family) if row.family else no_family if alive else ""
    back = "" if row.distance is None else num(row.distance, 2)
    label = "" if row.label is None else written(row.label)
    leading = "" if head is not None else f'<span class="quiet">h{row.head}</span> '
    return (
        f'<tr{"" if alive else " class=dead"}><td class="n"><a href="{features}{row.index}{chosen}">{row.index}</a>'
        f'<td class="label">{label}<td class="snip">{_words(row.snippet, alive)}<td class="from">{_source(row.snippet)}'
        f'<td class="n">{strongest}<td class="n">{mean}<td class="n">{fires}'
        f'<td class="n">{leading}{_share(row.head_share)}<td class="n">{_by_data(row, head)}<td class="n">{back}'
        f'<td class="kind"{said}>{family}<td class="clip">{" ".join(map(token_chip, row.promoted))}\n'
    )


def _words(shown: Snippet | None, alive: bool) -> str:
    if shown is None:
        return "" if alive else '<span class="quiet">dead</span>'
    return (
        f'<div class="kwic"><bdi class="l">{token_text(shown.before)}</bdi><span class="t dest">{token_text(shown.token)}</span>'
        f'<bdi class="r">{token_text(shown.after)}</bdi></div>'
    )


def _source(shown: Snippet | None) -> str:
    if shown is None or shown.source is None:
        return ""
    where = f"{shown.source_offset}".replace("-", "−") if shown.source_offset else "itself"
    return f'{token_chip(shown.source)} <span class="quiet">{where}</span>'


def _by_data(row: FeatureRow, head: int | None) -> str:
    if row.dfa_share is None:
        return ""
    if head is None:
        return f'<span class="quiet">h{row.dfa_head}</span> {_share(row.dfa_share)}'
    return f'<span class="{"neg" if row.dfa and row.dfa < 0 else "pos"}">{signed(row.dfa, 2)}</span> {_share(row.dfa_share)}'


@lru_cache(maxsize=4096)
def _share(share: float) -> str:
    return f"{share_bar(share, 1, BAR)} {percent(share, 2)}"
