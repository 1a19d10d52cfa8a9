"""Text made into HTML: what is escaped, what an invisible character becomes, and the one place that says a string is markup."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from markupsafe import Markup, escape


def made(html: str) -> Markup:
    """`html` as markup, which is not escaped again. Its maker answers for it: every text in it has been through `escape` or one
    of the functions below, and all else is numbers and words of ours. No other place says so."""
    return Markup(html)  # noqa: S704 - that is what this function is for


def escaped(texts: Sequence[str]) -> list[str]:
    """Many short texts escaped, in one step for all."""
    return str(escape(_BETWEEN.join([text.replace(_BETWEEN, "␀") for text in texts]))).split(_BETWEEN) if texts else []


_BETWEEN = "\0"
_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x00": "␀"}
_LINE_END = Markup('<i class="nl">↵</i>')
_SPACE = Markup('<i class="sp">·</i>')


@lru_cache(maxsize=65536)
def token_text(text: str) -> Markup:
    """A token as people see it: escaped, and no character invisible or able to turn the text around it."""
    return escape(visible(text)).replace("↵", _LINE_END)


@lru_cache(maxsize=65536)
def token_chip(text: str) -> Markup:
    """A token standing alone, its spaces made visible."""
    spaced = escape(visible(text)).replace(" ", _SPACE).replace("↵", _LINE_END)
    return Markup('<span class="chip">{}</span>').format(spaced)


def visible(text: str) -> str:
    """`text` with no character invisible, or able to turn the text around it."""
    if text.isprintable():  # nearly every text: nothing of it is hidden, nor one of the signs
        return text
    return "".join(_SIGNS.get(c) or (f"⟨{ord(c):X}⟩" if _hidden(c) else c) for c in text)


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
