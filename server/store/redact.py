"""Which parts of stored text are of a document, told by its words: what is stored is cut into tokens, packed with other documents
and quoted by people, so that it is the document's text but seldom all of it."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

REMOVED = "█"
"""Stands for what was removed, token by token."""
GRAM = 8
"""So many words in a row are taken for the document's."""
SEAM = 3
"""Fewer, but this many, where a row cuts the document's end off."""
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_BYTES = re.compile("(?:<0x[0-9A-F]{2}>)+")
Span = tuple[int, int]


def words(text: str) -> list[tuple[str, Span]]:
    """The words of `text` as they are compared, each with where it stands."""
    return [(unicodedata.normalize("NFKC", found[0]).casefold(), found.span()) for found in _WORD.finditer(text)]


class Matcher:
    """Finds the text of some documents in what is stored."""

    def __init__(self, documents: Iterable[str]) -> None:
        said = [[word for word, _ in words(text)] for text in documents]
        self._grams = {n: set[tuple[str, ...]]() for n in {min(GRAM, len(one)) for one in said} - {0}}
        for one in said:
            if n := min(GRAM, len(one)):
                self._grams[n].update(tuple(one[i : i + n]) for i in range(len(one) - n + 1))
        self._joined = [f" {' '.join(one)} " for one in said if one]

    def covered(self, found: Sequence[str]) -> list[bool]:
        """Of the words `found`, in their order, which are of a document."""
        mine = [False] * len(found)
        for n, grams in self._grams.items():
            for i in range(len(found) - n + 1):
                if tuple(found[i : i + n]) in grams:
                    mine[i : i + n] = [True] * n
        return mine

    def text(self, text: str) -> str:
        """`text` with what is quoted of a document taken out."""
        found = words(text)
        mine = self.covered([word for word, _ in found])
        for begin, end in reversed(_runs(mine)):
            text = text[: found[begin][1][0]] + REMOVED + text[found[end - 1][1][1] :]
        return text

    def tokens(self, texts: Sequence[str], *, packed: bool) -> list[str]:
        """The tokens of a row, those of a document replaced; `packed`: the first, a row start, parts documents."""
        kept = list(texts)
        ends = [i for i, text in enumerate(texts) if text == texts[0]] if packed and texts else [-1]
        for begin, end in zip(ends, [*ends[1:], len(texts)], strict=True):
            for i in self._of_part(texts[begin + 1 : end], first=begin <= 0, last=end == len(texts)):
                kept[begin + 1 + i] = REMOVED
        return kept

    def _of_part(self, texts: Sequence[str], *, first: bool, last: bool) -> Sequence[int]:
        """Which tokens of one document's part of a row are of a document that goes."""
        text, at = _joined(texts)
        found = words(text)
        mine = self.covered([word for word, _ in found])
        if 2 * sum(mine) >= len(mine) > 0:  # a part is of one document: with its words go its edges, where a word may be cut
            return range(len(texts))
        if not any(mine):
            said = [word for word, _ in found]
            ending = said[1:] if first else said  # its first word may have begun in the row before
            begun = said[:-1] if last and not first else ()
            seam = (SEAM <= len(ending) < GRAM and any(one.endswith(f" {' '.join(ending)} ") for one in self._joined)) or (
                SEAM <= len(begun) < GRAM and any(f" {' '.join(begun)} " in one for one in self._joined)
            )
            return range(len(texts)) if seam else ()
        spans = [(found[begin][1][0], found[end - 1][1][1]) for begin, end in _runs(mine)]
        return sorted({at[c] for low, high in spans for c in range(low, high)})

    def json(self, value: Any) -> Any:
        """JSON with a document's text taken out: from strings, and from lists of tokens."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.json(held) for key, held in value.items()}
        if isinstance(value, list):
            if len(value) >= SEAM and all(isinstance(held, str) for held in value):
                return self.tokens(value, packed=False)
            return [self.json(held) for held in value]
        return value


def _joined(texts: Sequence[str]) -> tuple[str, list[int]]:
    """The tokens' text, characters that were cut into bytes made whole, and of each character the token it begins in."""
    raw, at = "".join(texts), [i for i, text in enumerate(texts) for _ in text]
    parts, places, last = [], [], 0
    for found in _BYTES.finditer(raw):
        whole = bytes.fromhex(found[0].replace("<0x", "").replace(">", "")).decode(errors="ignore")
        parts += [raw[last : found.start()], whole]
        places += [*at[last : found.start()], *[at[found.start()]] * len(whole)]
        last = found.end()
    return "".join([*parts, raw[last:]]), [*places, *at[last:]]


def _runs(mine: Sequence[bool]) -> list[Span]:
    """Where the trues begin and end."""
    edges = [i for i in range(len(mine) + 1) if (i < len(mine) and mine[i]) != (i > 0 and mine[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))
