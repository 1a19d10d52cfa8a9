"""Search: which features fire on a token, promote or suppress it, have examples with a given text, or are called by a label.

What is searched is written once a harvest's parts are, before it is published, in chunks as harvests.py writes them; an
older harvest is filled by `headscope db search`. Of each feature at most `TOKENS_KEPT` tokens are kept: those on which its
kept examples end, by their strongest activation, and the promoted and suppressed ones that its page shows.

Texts are searched by words in their order, the same way on SQLite (FTS5) and PostgreSQL (tsvector with GIN). What a word is
is said here, not by either database: letters, marks and digits that stand together, in small letters and compatibility
form; every character of a script that is written without spaces is a word of its own. So `read_rows(path)` is three words
and is found by `rows(path`, and two Chinese characters are found within a sentence, which neither database's own tokenizer
does: FTS5 and PostgreSQL take a run of Chinese as one word, and trigrams find nothing shorter than three characters.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from sae_core.errors import UsageError
from server.db import Database
from server.store.chunks import cut
from server.store.features import FeatureRow, Snippet, feature_rows
from server.store.harvests import Fence, insert_plain, write_chunks
from server.store.labels import LabelLine, LabelQuery, labels_containing, labels_page
from server.store.redact import REMOVED
from server.store.saes import Door, SaeRef, sae_ref
from server.store.walk import Place
from server.tables import SAE, Context, Corpus, Example, Feature, FeatureDetail, FeatureToken, Harvest, HarvestPart, Model, Token

FIRES, PROMOTES, SUPPRESSES = 0, 1, 2
TOKENS_KEPT = 12
"""Tokens of a feature's examples that are kept to be searched, the strongest first."""
TEXTS_WRITTEN, TOKENS_WRITTEN = "search texts", "search tokens"
"""Marks of what is written, among a harvest's parts."""
ROWS_AT_ONCE = 4000
CONTEXTS_AT_ONCE = 200
FEATURES_AT_ONCE = 500
LONGEST = 200
"""Characters of a query that are looked at."""
PAGE = 50
SPELLINGS = 12
"""Tokens that are the same word but for spaces and capitals: ` board`, `board`, `Board`, ..."""
TEXT_ROWS = 24
"""Rows of text that are looked at for one query."""
TEXT_EXAMPLES = 1500
"""Examples in them that are looked at."""

Kind = Literal["text", "token", "promotes", "suppresses", "label"]
KINDS: tuple[Kind, ...] = ("text", "token", "promotes", "suppresses", "label")
_OF_KIND: dict[str, int] = {"token": FIRES, "promotes": PROMOTES, "suppresses": SUPPRESSES}


# ---- words ----

_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
"""Thai and Lao, Myanmar, Khmer, Japanese kana, Chinese characters: no spaces between words."""


_ASCII = re.compile("[0-9a-z]+")


def words(text: str) -> list[str]:
    """The words of `text`, as they are compared."""
    if text.isascii():
        return _ASCII.findall(text.casefold())
    found: list[str] = []
    run: list[str] = []
    for c in unicodedata.normalize("NFKC", text).casefold():
        alone = c >= "\u0e00" and any(low <= ord(c) <= high for low, high in _UNSPACED) and c.isalnum()
        within = not alone and (c.isalnum() or (bool(run) and unicodedata.category(c).startswith("M")))
        if run and not within:
            found.append("".join(run))
            run = []
        if within:
            run.append(c)
        elif alone:
            found.append(c)
    return [*found, "".join(run)] if run else found


def word(token: str) -> str:
    """A token as it is looked for: what stands between its spaces, in small letters; of spaces alone all of them."""
    return (token.strip(" ") or token).casefold()


# ---- writing ----


def write(db: Database, harvest_id: int, fence: Fence) -> None:
    """Store what is searched of a harvest whose parts are written. Broken off, it is to be called again."""
    write_chunks(db, harvest_id, TEXTS_WRITTEN, cut(_texts(db, harvest_id), lambda _: 1, CONTEXTS_AT_ONCE), _insert_texts, fence)
    put_words_in(db)
    with db.read() as session:
        done = is_searched(session, harvest_id)
    if not done:
        rows = _with_token_ids(db, _token_rows(db, harvest_id), fence)
        write_chunks(db, harvest_id, TOKENS_WRITTEN, cut(rows, lambda _: 1, ROWS_AT_ONCE), _insert_tokens, fence)


def put_words_in(db: Database) -> None:
    """Let PostgreSQL put new words into their index now. First it puts them into a list, which every search walks through and
    for which it thinks little of the index. Only whoever owns the index may ask for it; for others autovacuum does it, later."""
    if not db.is_file:
        with db.write() as session:
            session.execute(
                sa.text(
                    "select gin_clean_pending_list(cast(oid as regclass)) from pg_class "
                    "where oid = to_regclass('ix_context_text_words') and pg_has_role(relowner, 'USAGE')"
                )
            )


def index_texts(session: Session, harvest_id: int) -> None:
    """Put the texts of a harvest into an index that has none of them, all in this transaction."""
    last = 0
    while part := _contexts_after(session, harvest_id, last):
        _insert_texts(session, harvest_id, [(row.id, words("".join(row.texts))) for row in part])
        last = part[-1].id


def forget_tokens(session: Session, harvest_id: int) -> None:
    """Forget what tokens a harvest's features have to do with; `write` finds it anew, from the examples as they are now."""
    session.execute(sa.delete(FeatureToken).where(FeatureToken.harvest_id == harvest_id))
    mark = sa.or_(HarvestPart.part == TOKENS_WRITTEN, HarvestPart.part.startswith(f"{TOKENS_WRITTEN}/"))
    session.execute(sa.delete(HarvestPart).where(HarvestPart.harvest_id == harvest_id, mark))


def drop_unused_tokens(session: Session) -> None:
    """Forget the texts of tokens that no feature has to do with."""
    session.execute(sa.delete(Token).where(Token.id.not_in(sa.select(FeatureToken.token_id))))


def index_text(session: Session, harvest_id: int, context_id: int, texts: Sequence[str]) -> None:
    """Put the text of one context into the index, if its harvest's texts are in it."""
    if session.get(HarvestPart, (harvest_id, TEXTS_WRITTEN)) is not None:
        _insert_texts(session, harvest_id, [(context_id, words("".join(texts)))])


def is_searched(session: Session, harvest_id: int) -> bool:
    """Whether all that is searched of the harvest is written."""
    return session.get(HarvestPart, (harvest_id, TOKENS_WRITTEN)) is not None


def unfenced(session: Session) -> None:
    """The fence of what no job writes."""


def lacking(session: Session) -> list[tuple[int, str]]:
    """Published harvests that nothing is searched of yet, with their SAE's name."""
    written = sa.select(HarvestPart.harvest_id).where(HarvestPart.part == TOKENS_WRITTEN)
    found = session.execute(
        sa.select(Harvest.id, SAE.name)
        .join(SAE, SAE.harvest_id == Harvest.id)
        .where(Harvest.id.not_in(written))
        .order_by(Harvest.id)
    )
    return [(row.id, row.name) for row in found]


def delete_texts(session: Session, contexts: Sequence[int]) -> None:
    """Forget the texts of these contexts; tokens go with their harvest."""
    key: sa.ColumnClause[int] = sa.column("rowid" if _is_sqlite(session) else "context_id")
    session.execute(sa.delete(sa.table("context_text", key)).where(key.in_(contexts)))


def _is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def _contexts_after(session: Session, harvest_id: int, last: int) -> Sequence[Any]:
    statement = sa.select(Context.id, Context.texts).where(Context.harvest_id == harvest_id, Context.id > last)
    return session.execute(statement.order_by(Context.id).limit(CONTEXTS_AT_ONCE)).all()


def _texts(db: Database, harvest_id: int) -> Iterator[tuple[int, list[str]]]:
    """(context id, its words) of every context, by id."""
    last = 0
    while True:
        with db.read() as session:
            part = _contexts_after(session, harvest_id, last)
        if not part:
            return
        yield from ((row.id, words("".join(row.texts))) for row in part)
        last = part[-1].id


def _insert_texts(session: Session, harvest_id: int, chunk: list[tuple[int, list[str]]]) -> None:
    # The harvest is a word itself, so that looking within one is a matter of the index as well.
    if _is_sqlite(session):
        statement = sa.text("insert into context_text (rowid, words) values (:id, :words)")
        rows = [{"id": id, "words": " ".join((_mark(harvest_id), *said))} for id, said in chunk]
    else:
        statement = sa.text("insert into context_text (context_id, words) values (:id, cast(:words as tsvector))")
        rows = [{"id": id, "words": _tsvector((_mark(harvest_id), *said))} for id, said in chunk]
    session.execute(statement, rows)


def _mark(harvest_id: int) -> str:
    return f"harvest{harvest_id}x"


def _quoted(said: str) -> str:
    # Words hold letters, marks and digits only: nothing in them ends the quotes, here or in FTS5.
    return f"'{said[:LONGEST]}'"


def _tsvector(said: Sequence[str]) -> str:
    # PostgreSQL knows places up to 16,383.
    return " ".join(f"{_quoted(one)}:{at}" for at, one in enumerate(said[:16383], 1))


Rows = NDArray[np.void]
_FOUND = np.dtype([("idx", "<i8"), ("text", "<i8"), ("act", "<f8")])


def _token_rows(db: Database, harvest_id: int) -> tuple[list[str], Iterator[tuple[int, int, float, int, int]]]:
    """The tokens' texts, and (kind, text's number, weight, feature, n) of each row."""
    numbers: dict[str, int] = {}
    with db.read() as session:
        ids = session.execute(
            sa.select(Feature.id, Feature.idx).where(Feature.harvest_id == harvest_id).order_by(Feature.id)
        ).all()
    of_id = {row.id: row.idx for row in ids}
    fired = _strongest(_destinations(db, harvest_id, of_id, numbers))
    moved: list[tuple[int, int, float, int, int]] = []
    for begin in range(0, len(ids), FEATURES_AT_ONCE):
        part = [row.id for row in ids[begin : begin + FEATURES_AT_ONCE]]
        with db.read() as session:
            details = session.execute(
                sa.select(FeatureDetail.feature_id, FeatureDetail.promoted, FeatureDetail.suppressed).where(
                    FeatureDetail.feature_id.in_(part)
                )
            ).all()
        for feature_id, promoted, suppressed in details:
            for kind, tokens in ((PROMOTES, promoted), (SUPPRESSES, suppressed)):
                # A token may be listed twice where two ids have one text: its better place counts.
                once = {text: (rank, value) for rank, (_, text, value) in reversed(list(enumerate(tokens)))}
                for text, (rank, value) in once.items():
                    moved.append((kind, numbers.setdefault(text, len(numbers)), abs(value), of_id[feature_id], rank))
    return list(numbers), iter([*fired, *moved])


def _destinations(db: Database, harvest_id: int, of_id: dict[int, int], numbers: dict[str, int]) -> Rows:
    """(feature, token it ends on, activation) of every kept example. `of_id` has the features by their ids, rising."""
    parts, last, example = [np.zeros(0, _FOUND)], 0, Example.__table__.c
    ids, idx = np.fromiter(of_id, np.int64, len(of_id)), np.fromiter(of_id.values(), np.int64, len(of_id))
    while True:
        with db.read() as session:
            contexts = _contexts_after(session, harvest_id, last)
            if not contexts:
                return np.concatenate(parts)
            # Of plain columns: there are hundreds of thousands of rows, and the ORM takes its time by the row.
            wanted = sa.select(*(example[name] for name in ("feature_id", "context_id", "dest", "act")))
            here = example.context_id.in_([row.id for row in contexts])
            examples = session.connection().execute(wanted.where(here)).all()
        last = contexts[-1].id
        if examples:
            texts = {row.id: row.texts for row in contexts}
            feature_ids, context_ids, dests, acts = zip(*examples, strict=True)
            part = np.zeros(len(examples), _FOUND)
            part["idx"], part["act"] = idx[np.searchsorted(ids, feature_ids)], acts
            found = [texts[context][dest] for context, dest in zip(context_ids, dests, strict=True)]
            part["text"] = [numbers.setdefault(text, len(numbers)) for text in found]
            parts.append(part[[text != REMOVED for text in found]])


def _strongest(found: Rows) -> list[tuple[int, int, float, int, int]]:
    """Of each feature's tokens the `TOKENS_KEPT` strongest, as rows."""
    if not len(found):
        return []
    found = found[np.lexsort((-found["act"], found["text"], found["idx"]))]
    new = np.append(True, (found["idx"][1:] != found["idx"][:-1]) | (found["text"][1:] != found["text"][:-1]))
    first = np.flatnonzero(new)
    n = np.diff(np.append(first, len(found)))
    best = found[first]  # the strongest example of each (feature, token)
    order = np.lexsort((-best["act"], best["idx"]))
    best, n = best[order], n[order]
    begins = np.flatnonzero(np.append(True, best["idx"][1:] != best["idx"][:-1]))
    rank = np.arange(len(best)) - np.repeat(begins, np.diff(np.append(begins, len(best))))
    keep = rank < TOKENS_KEPT
    rows = zip(best["text"][keep].tolist(), best["act"][keep].tolist(), best["idx"][keep].tolist(), n[keep].tolist(), strict=True)
    return [(FIRES, text, act, idx, count) for text, act, idx, count in rows]


def _with_token_ids(
    db: Database, made: tuple[list[str], Iterable[tuple[int, int, float, int, int]]], fence: Fence
) -> Iterator[tuple[int, int, float, int, int]]:
    """The rows with ids of `token`, in the order of the table's key, so that they are written one behind the other."""
    texts, rows = made
    ids = _token_ids(db, texts, fence)
    return iter(sorted((kind, ids[texts[text]], weight, idx, n) for kind, text, weight, idx, n in rows))


def _token_ids(db: Database, texts: Sequence[str], fence: Fence) -> dict[str, int]:
    """The id of each text, given where it has none. In one order, so that two workers never wait for each other in a ring."""
    wanted = sorted(set(texts))
    known: dict[str, int] = {}
    for begin in range(0, len(wanted), FEATURES_AT_ONCE):
        part = wanted[begin : begin + FEATURES_AT_ONCE]
        there = sa.select(Token.text, Token.id).where(Token.text.in_(part))
        with db.read() as session:
            known.update((row.text, row.id) for row in session.execute(there))
        new = [text for text in part if text not in known]
        if new:
            with db.write() as session:
                fence(session)
                _insert_new(session, new)
                known.update((row.text, row.id) for row in session.execute(there))
    return known


def _insert_new(session: Session, texts: Sequence[str]) -> None:
    session.execute(
        sa.text("insert into token (text, word) values (:text, :word) on conflict do nothing"),
        [{"text": text, "word": word(text)} for text in texts],
    )


FEATURE_TOKEN = {"harvest_id": "int4", "kind": "int4", "token_id": "int4", "weight": "float8", "idx": "int4", "n": "int4"}


def _insert_tokens(session: Session, harvest_id: int, chunk: list[tuple[int, int, float, int, int]]) -> None:
    insert_plain(session, "feature_token", FEATURE_TOKEN, ((harvest_id, *row) for row in chunk))


# ---- tokens ----


@dataclass(frozen=True)
class Hit:
    """A feature that was found."""

    sae: str
    """Name of the SAE."""
    index: int
    family: str | None
    verdict: str | None
    max_act: float
    snippet: Snippet | None
    """Its strongest example, or the one with the text that was looked for."""
    token: str | None
    """The token that was found."""
    weight: float | None
    """Its strongest activation on that token, or how much it promotes or suppresses it; in a text, the example's activation."""
    n: int | None
    """Kept examples that end on the token; for promoted and suppressed ones its place, from 0."""
    band: int | None
    """Of the example with the text."""
    rank: int | None
    """Place of that example within its band."""
    within: bool
    """The feature fires within the text that was looked for."""
    label: str | None
    """What people, or else a method, call it; where labels were searched, the one that was found."""


@dataclass(frozen=True)
class Found:
    """What a search within one SAE found."""

    sae: SaeRef
    """Which SAE."""
    q: str
    """What was looked for."""
    kind: Kind
    """How it was looked for."""
    hits: tuple[Hit, ...]
    """What was found, best first."""
    spellings: tuple[str, ...]
    """The tokens that were meant."""
    rows: int
    """Rows of text that were looked at."""
    more_rows: bool
    """There are further rows with this text."""
    next: str | None
    """Where the next page begins."""
    trouble: str | None
    """Why nothing was looked for, in a sentence."""


def search(session: Session, door: Door, q: str, kind: Kind, after: str | None = None) -> Found:
    """Features of an SAE's published harvest for `q`."""
    q = asked(q)
    trouble = _trouble(session, door, q, kind)
    if trouble or door.sae.harvest is None:
        return Found(door.sae, q, kind, (), (), 0, False, None, trouble)
    if kind == "text":
        return _search_text(session, door, q)
    if kind == "label":
        return _search_label(session, door, q, after)
    return _search_token(session, door, q, kind, after)


def asked(q: str) -> str:
    """What is looked for: as much of `q` as is looked at, without the one character that no database holds."""
    return q[:LONGEST].replace("\0", "")


def _trouble(session: Session, door: Door, q: str, kind: Kind) -> str | None:
    if door.sae.harvest is None:
        return f"{door.sae.name} has no published harvest yet, so there is nothing to search."
    if not q or (not q.strip() and kind in ("text", "label")):
        return "Type what to look for."
    if kind == "text" and not words(q):
        return f"'{q.strip()}' has no letter or digit in it, and texts are searched by words; look for it as a token."
    if kind != "label" and not is_searched(session, door.sae.harvest.id):
        return "This harvest was made before there was a search; `headscope db search` makes it searchable."
    return None


def spellings(session: Session, q: str) -> Sequence[sa.Row[int, str]]:
    """The tokens that `q` means: those that are it exactly, else those that are the same word; the nearest first."""
    same = session.execute(sa.select(Token.id, Token.text).where(Token.word == word(q)).limit(200)).all()
    exactly = [row for row in same if row.text == q and q != q.strip(" ")]
    nearest = sorted(same, key=lambda row: (row.text != q, row.text.strip(" ") != q.strip(" "), len(row.text), row.text))
    return exactly or nearest[:SPELLINGS]


def _search_token(session: Session, door: Door, q: str, kind: Kind, after: str | None) -> Found:
    assert door.sae.harvest is not None
    tokens = spellings(session, q)
    start = None if after is None else Place.read(after, "weight")
    rows = _strongest_rows(session, door.sae.harvest.id, _OF_KIND[kind], [row.id for row in tokens], start, PAGE + 1)
    texts = {row.id: row.text for row in tokens}
    shown = rows[:PAGE]
    lines = {line.index: line for line in feature_rows(session, door, None, sorted({row.idx for row in shown}))}
    hits = tuple(
        _hit(door.sae.name, lines[row.idx], token=texts[row.token_id], weight=row.weight, n=row.n)
        for row in shown
        if row.idx in lines
    )
    more = str(Place(shown[-1].weight, shown[-1].idx)) if len(rows) > PAGE else None
    return Found(door.sae, q, kind, hits, tuple(texts.values()), 0, False, more, None)


def _strongest_rows(
    session: Session, harvest_id: int, kind: int, token_ids: Sequence[int], start: Place | None, limit: int
) -> list[sa.Row[Any]]:
    """The strongest of all the tokens' rows: each token's own strongest, looked up in order, and of those the strongest."""
    parts = []
    for token_id in token_ids:
        mine = sa.select(FeatureToken.token_id, FeatureToken.weight, FeatureToken.idx, FeatureToken.n).where(
            FeatureToken.harvest_id == harvest_id, FeatureToken.kind == kind, FeatureToken.token_id == token_id
        )
        if start is not None:
            mine = mine.where(
                sa.tuple_(FeatureToken.weight, FeatureToken.idx) < sa.tuple_(sa.literal(start.value), sa.literal(start.idx))
            )
        parts.append(sa.select(mine.order_by(FeatureToken.weight.desc(), FeatureToken.idx.desc()).limit(limit).subquery()))
    if not parts:
        return []
    united = sa.union_all(*parts).subquery()
    return list(session.execute(sa.select(united).order_by(united.c.weight.desc(), united.c.idx.desc()).limit(limit)))


def _hit(sae: str, line: FeatureRow, **told: Any) -> Hit:
    given = {
        "token": None,
        "weight": None,
        "n": None,
        "band": None,
        "rank": None,
        "within": False,
        "snippet": line.snippet,
        "label": line.label,
        **told,
    }
    return Hit(sae=sae, index=line.index, family=line.family, verdict=line.verdict, max_act=line.max_act, **given)


# ---- labels ----


def _search_label(session: Session, door: Door, q: str, after: str | None) -> Found:
    """The features with such a label, the newest label first. Labels are searched as they are written, whatever the harvest."""
    before = None if after is None else Place.read(after, "label").idx
    found = labels_containing(session, door.id, q.strip(), before, PAGE + 1)
    shown = found[:PAGE]
    lines = {line.index: line for line in feature_rows(session, door, None, [row.idx for row in shown])}
    hits = tuple(_hit(door.sae.name, lines[row.idx], label=row.text) for row in shown if row.idx in lines)
    more = str(Place(None, shown[-1].id)) if len(found) > PAGE else None
    return Found(door.sae, q, "label", hits, (), 0, False, more, None)


# ---- texts ----


def _search_text(session: Session, door: Door, q: str) -> Found:
    harvest = door.sae.harvest
    assert harvest is not None
    rows = _rows_with(session, q, harvest.id, TEXT_ROWS + 1)
    said_in = sa.select(Context.id, Context.texts).where(Context.id.in_(rows[:TEXT_ROWS]))
    texts: dict[int, list[str]] = {row.id: row.texts for row in session.execute(said_in)}
    spans = {id: span for id, said in texts.items() if (span := span_of(said, q)) is not None}
    found: Sequence[Any] = session.execute(
        sa.select(Feature.idx, Feature.max_act, Example.context_id, Example.band, Example.rank, Example.dest, Example.act)
        .select_from(Example)
        .join(Feature, Feature.id == Example.feature_id)
        .where(Example.context_id.in_(list(spans)))
        .order_by(Example.band, Example.rank, Feature.idx, Example.context_id)  # to the end, lest databases differ
        .limit(TEXT_EXAMPLES)
    ).all()

    def nearness(row: Any) -> tuple[bool, float, int, int, int]:
        low, high = spans[row.context_id]
        # To the end, so that ties stand in the same order in every database.
        return not low <= row.dest < high, -row.act / (row.max_act or 1), row.idx, row.band, row.rank

    best: dict[int, Any] = {}
    for row in sorted(found, key=nearness):
        best.setdefault(row.idx, row)
    shown = dict(list(best.items())[:PAGE])
    lines = {line.index: line for line in feature_rows(session, door, None, list(shown))}
    hits = []
    for idx, row in shown.items():
        said, (low, high) = texts[row.context_id], spans[row.context_id]
        snippet = Snippet(
            "".join(said[max(0, row.dest - 10) : row.dest]),
            said[row.dest],
            "".join(said[row.dest + 1 : row.dest + 4]),
            None,
            None,
        )
        within = low <= row.dest < high
        told = {"snippet": snippet, "weight": row.act, "band": row.band, "rank": row.rank, "within": within}
        hits.append(_hit(door.sae.name, lines[idx], **told))
    return Found(door.sae, q, "text", tuple(hits), (), min(len(rows), TEXT_ROWS), len(rows) > TEXT_ROWS, None, None)


def _rows_with(session: Session, q: str, harvest_id: int, limit: int) -> list[int]:
    """Ids of contexts of a harvest that have these words one after the other; the last may be the beginning of a word."""
    said = words(q)
    if _is_sqlite(session):
        match = f'"{_mark(harvest_id)}" AND "{" ".join(said)}" *'
        statement = sa.text("select rowid from context_text where context_text match :match order by rowid limit :limit")
    else:
        phrase = " <-> ".join([*map(_quoted, said[:-1]), f"{_quoted(said[-1])}:*"])
        match = f"{_quoted(_mark(harvest_id))} & ({phrase})"
        statement = sa.text(
            "select context_id from context_text where words @@ cast(:match as tsquery) order by context_id limit :limit"
        )
    return list(session.scalars(statement, {"match": match, "limit": limit}))


def span_of(texts: Sequence[str], q: str) -> tuple[int, int] | None:
    """The tokens, from and to, in which `q` stands: as it was typed if possible, else its words with anything between them."""
    joined = "".join(texts)
    between = r"[\W_]*".join(map(re.escape, words(q)))
    found = re.search(re.escape(q.strip()), joined, re.IGNORECASE) or (
        re.search(between, joined, re.IGNORECASE) if between else None
    )
    if found is None:
        # Compatibility forms and the like: the row has the words, but not in these characters.
        return 0, len(texts)
    ends = np.cumsum([len(text) for text in texts])
    return int(np.searchsorted(ends, found.start(), "right")), int(np.searchsorted(ends, found.end() - 1, "right")) + 1


# ---- over everything ----


@dataclass(frozen=True)
class Overall:
    """What a search over everything found."""

    q: str
    """What was looked for."""
    models: tuple[str, ...]
    """Models whose names contain it."""
    saes: tuple[SaeRef, ...]
    """SAEs whose names contain it."""
    tokens: tuple[Hit, ...]
    """Features that fire on the token, the strongest of each SAE, relative to their own maximum."""
    spellings: tuple[str, ...]
    """The tokens that were meant."""
    labels: tuple[LabelLine, ...]
    """Labels that contain it, of every SAE, newest first."""
    more_labels: bool
    """There are further ones."""
    texts: tuple[tuple[str, int], ...]
    """SAEs in whose examples' rows the text stands, and in how many of the rows looked at."""
    trouble: str | None
    """Why nothing was looked for, in a sentence."""


MOST_SAES = 40
PER_SAE = 3
MOST_LABELS = 20


def search_all(session: Session, q: str) -> Overall:
    """SAEs and models by name, features by token and by label, SAEs by text; of the newest `MOST_SAES` published harvests."""
    q = asked(q)
    if not q.strip():
        return Overall(q, (), (), (), (), (), False, (), "Type what to look for.")
    name = q.strip().casefold()
    models = [one for one in session.scalars(sa.select(Model.name).order_by(Model.name)) if name in one.casefold()]
    there = session.execute(
        sa.select(SAE, Model.name, Harvest, Corpus.name)
        .join(Model, Model.id == SAE.model_id)
        .outerjoin(Harvest, Harvest.id == SAE.harvest_id)
        .outerjoin(Corpus, Corpus.id == Harvest.corpus_id)
        .order_by(SAE.created_at.desc(), SAE.id.desc())
    ).all()
    refs = [sae_ref(*row) for row in there]
    searched = [ref for ref in refs if ref.harvest is not None][:MOST_SAES]
    tokens = spellings(session, q)
    labels = labels_page(session, LabelQuery(q=q.strip(), limit=MOST_LABELS))
    return Overall(
        q=q,
        models=tuple(models),
        saes=tuple(ref for ref in refs if name in ref.name.casefold() or name in ref.hook.casefold())[:PAGE],
        tokens=tuple(_tokens_of_all(session, searched, {row.id: row.text for row in tokens})),
        spellings=tuple(row.text for row in tokens),
        labels=labels.lines,
        more_labels=labels.next is not None,
        texts=tuple(_texts_of_all(session, searched, q)),
        trouble=None,
    )


def _tokens_of_all(session: Session, refs: Sequence[SaeRef], texts: dict[int, str]) -> Iterator[Hit]:
    for ref in refs:
        assert ref.harvest is not None
        rows = _strongest_rows(session, ref.harvest.id, FIRES, list(texts), None, PER_SAE)
        known = _few(session, ref.harvest.id, [row.idx for row in rows])
        for row in rows:
            if row.idx in known:
                other = known[row.idx]
                yield Hit(
                    ref.name, row.idx, other.family, other.verdict, other.max_act, None, texts[row.token_id], row.weight, row.n,
                    None, None, False, None,
                )  # fmt: skip


def _few(session: Session, harvest_id: int, wanted: Sequence[int]) -> dict[int, sa.Row[Any]]:
    rows: Iterable[sa.Row[Any]] = session.execute(
        sa.select(Feature.idx, Feature.family, Feature.max_act, FeatureDetail.verdict)
        .join(FeatureDetail, FeatureDetail.feature_id == Feature.id)
        .where(Feature.harvest_id == harvest_id, Feature.idx.in_(wanted))
    )
    return {row.idx: row for row in rows}


def _texts_of_all(session: Session, refs: Sequence[SaeRef], q: str) -> Iterator[tuple[str, int]]:
    if not words(q):
        return
    for ref in refs:
        assert ref.harvest is not None
        n = len(_rows_with(session, q, ref.harvest.id, TEXT_ROWS))
        if n:
            yield ref.name, n


def check_kind(kind: str) -> Kind:
    """`kind` as one of KINDS; UsageError when it is none."""
    for known in KINDS:
        if kind == known:
            return known
    raise UsageError(f"There is no search by '{kind}'; there is one by {', '.join(KINDS)}.", field="kind")
