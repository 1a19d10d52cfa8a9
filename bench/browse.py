"""How quickly a large database is browsed: 26 layers of 49,152 features, every sort, filter and page of the table, and search.

The database is generated, with distributions like those of real harvests, and kept in the cache on SQLite; PostgreSQL gets it
anew in a server of its own. Every feature has its row and its shares at eight heads. What a line of the table shows besides,
details and the strongest example, and what is searched, is there for the `DEEP` harvests that are asked about; the others make
the tables and indexes large. A question is one page of 50 lines, with its count, from a session that is open: no two questions
have the same bounds, so no count is known before. `page_*` are the same questions through the web process, as htmx asks them.
"""

import gc
import itertools
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from bench import _postgres
from bench._served import Client, Figure, headscope, spread, times_of
from server.db import Database
from server.packing import F4, I4, pack
from server.settings import Settings
from server.store import search
from server.store.features import SORT_KEYS, FeatureQuery, feature_table, place_of
from server.store.saes import Door, find_sae
from server.store.walk import ALWAYS
from server.tables import (
    SAE,
    Base,
    Context,
    Corpus,
    Example,
    Feature,
    FeatureDetail,
    FeatureHead,
    FeatureToken,
    Harvest,
    HarvestPart,
    Model,
    Token,
)

HEADS, DEEP, ROWS, CONTEXT, VOCABULARY = 8, 2, 4096, 64, 20_000
FAMILIES = ("induction", "previous token", "local", "long-range", "duplicate token", "suppression", None, None, None)
WORDS = re.findall(
    r"\w+",
    """
    the of and to in tide said river light model board under between children window morning street paper value return import
    class list range index path row lines count number water ground history language system people question answer
""",
)
PART = {"HX-Request": "true", "HX-Request-Type": "partial"}


def run(features: int = 49_152, layers: int = 26, questions: int = 600) -> dict[str, Figure]:
    """Figures on SQLite, and on PostgreSQL where it is installed, with `_postgresql` behind their names."""
    place = Settings().cache / "bench" / f"browse-{layers}-{features}"
    if not (place / "headscope.db").exists():
        print(f"Generating {layers} x {features} features into {place}; once, some minutes.", file=sys.stderr, flush=True)
        place.mkdir(parents=True, exist_ok=True)
        half = place / "half.db"
        half.unlink(missing_ok=True)
        generate(sa.URL.create("sqlite", database=str(half)), features, layers)
        half.rename(place / "headscope.db")
    database = Database(sa.URL.create("sqlite", database=str(place / "headscope.db")))
    database.upgrade()  # one that an older version has made
    database.close()
    figures = measure(sa.URL.create("sqlite", database=str(place / "headscope.db")), questions)
    if _postgres.programs():
        with _postgres.server() as url:
            generate(url, features, layers)
            figures |= {f"{name}_postgresql": figure for name, figure in measure(url, questions).items()}
    else:
        print("  PostgreSQL is not installed here, so it was not measured.", file=sys.stderr)
    return figures


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(url: sa.URL, questions: int) -> dict[str, Figure]:
    """Every kind of question, in an order drawn at random."""
    database = Database(url)
    chosen = random.Random(0)
    gc.collect()
    gc.freeze()  # as the web process does before it serves
    with database.read() as session:
        doors = [find_sae(session, f"l{layer}") for layer in range(DEEP)]
        asked = list(itertools.islice(_questions(session, doors, chosen), questions))
        times = [_timed(feature_table, session, *one) for one in asked]
        for (door, query), took in sorted(zip(asked, times, strict=True), key=lambda one: -one[1])[:5]:
            print(f"  {took:.1f} ms: {door.sae.name} {query.asked()}", file=sys.stderr)
        searches = [(chosen.choice(doors), *one) for one in _searches(chosen, questions // 4)]
        found = [_timed(search.search, session, *one) for one in searches]
        again = list(itertools.islice(_questions(session, doors, chosen), questions))
    database.close()
    figures = spread("", times, "<= 10", "<= 40") | spread("search_", found, "<= 50")
    paths = iter([f"/saes/{door.sae.name}?{urlencode(query.asked())}" for door, query in again])
    environment = {"HEADSCOPE_DATABASE_URL": url.render_as_string(hide_password=False)}
    with headscope(environment) as address:
        figures |= spread("page_", times_of(Client(address, PART), lambda: next(paths), len(again) - 10)[0])
    return figures


def _timed(ask: Callable[..., object], *given: object) -> float:
    begun = time.perf_counter()
    ask(*given)
    return (time.perf_counter() - begun) * 1e3


def _questions(session: Session, doors: Sequence[Door], chosen: random.Random) -> Iterator[tuple[Door, FeatureQuery]]:
    """Every sort both ways, with every kind of filter, the first page and pages from anywhere on, both ways."""
    while True:
        for key, sign, filters in itertools.product(SORT_KEYS, ("", "-"), filter_kinds(chosen)):
            door = chosen.choice(doors)
            query = FeatureQuery(sort=f"{sign}{key}", **filters)
            at = place_of(session, door, chosen.randrange(door.sae.d_sae), query)
            yield door, query
            if at.value is not None or key not in ALWAYS:  # a feature without a share of that head is on no page of such a table
                yield door, query.model_copy(update={chosen.choice(("after", "before")): str(at)})


def filter_kinds(chosen: random.Random) -> list[dict[str, Any]]:
    """A filter of each kind and some of several, with bounds drawn anew."""
    head, low = chosen.randrange(HEADS), 10 ** chosen.uniform(-6, -2)
    density, largest = {"min_density": low, "max_density": low * 10}, {"min_max": chosen.uniform(1, 20)}
    return [
        {},
        density,
        largest,
        {"max_max": chosen.uniform(1, 20)},
        {"min_share": chosen.uniform(0.2, 0.8)},
        {"min_dfa_share": chosen.uniform(0.2, 0.8)},
        {"family": chosen.choice(["induction", "local", "unclear"])},
        {"dead": False},
        {"head": head},
        {"head": head, "leads": True, "min_max": chosen.uniform(0, 3)},
        {"head": head, "min_share": chosen.uniform(0.2, 0.6)},
        {**density, **largest},
        {**density, "family": "induction", "dead": False},
        {"head": head, "min_share": chosen.uniform(0.2, 0.6), **density, **largest},
    ]


def _searches(chosen: random.Random, n: int) -> Iterator[tuple[str, search.Kind]]:
    for number in range(n):
        kind = search.KINDS[number % len(search.KINDS)]
        words = [chosen.choice(WORDS) for _ in range(1 + number % 3)]
        yield (" ".join(words) if kind == "text" else f"w{chosen.randrange(VOCABULARY)}" if number % 2 else words[0]), kind


# ----------------------------------------------------------------------------------------------------------- generating


def generate(url: sa.URL, features: int, layers: int) -> None:
    """Fill an empty database; indexes are made when the rows are there."""
    database = Database(url)
    database.upgrade()
    bulk = (Feature, FeatureHead, FeatureDetail, Example)
    indexes = [index for table in bulk for index in Base.metadata.tables[table.__tablename__].indexes]
    with database.write() as session:
        connection = session.connection()
        for index in indexes:
            index.drop(connection)
        _few_rows(session, features, layers)
        for layer in range(layers):
            _layer(session, layer, features)
        for index in indexes:
            index.create(connection)
    for layer in range(min(DEEP, layers)):
        with database.write() as session:
            session.add(HarvestPart(harvest_id=layer + 1, part="search texts"))
            contexts = sa.select(Context.id, Context.texts).where(Context.harvest_id == layer + 1)
            said = [(row.id, search.words("".join(row.texts))) for row in session.execute(contexts)]
            search._insert_texts(session, layer + 1, said)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("analyze" if url.get_backend_name() == "postgresql" else "pragma wal_checkpoint(truncate)"))
    database.close()


def _few_rows(session: Session, features: int, layers: int) -> None:
    session.add_all([Model(name="m", source={}, n_layers=layers, n_heads=HEADS), Corpus(name="c", source={})])
    session.flush()
    for layer in range(layers):
        facts: dict[str, Any] = {"hook": f"blocks.{layer}.attn.hook_z", "arch": "topk", "d_in": 64 * HEADS, "k": 32}
        sae = SAE(
            name=f"l{layer}", model_id=1, layer=layer, d_sae=features, n_heads=HEADS, config={}, folder="", sha256="0", **facts
        )
        session.add(sae)
        session.flush()
        harvest = Harvest(id=layer + 1, sae_id=sae.id, corpus_id=1, job_id="j", config={}, status="published", context=CONTEXT)
        session.add(harvest)
        session.flush()
        sae.harvest_id = harvest.id
        session.flush()
    texts = [f" {word}" for word in WORDS] + [f" w{number}" for number in range(VOCABULARY)]
    _load(
        session, Token, ("id", "text", "word"), ((i, text, search.word(text)) for i, text in enumerate(dict.fromkeys(texts), 1))
    )


def _layer(session: Session, layer: int, n: int) -> None:
    rng = np.random.default_rng(layer)
    alive = rng.random(n) > 0.06
    density = np.where(alive, np.clip(np.exp(rng.normal(-7.5, 1.6, n)), 1e-7, 0.9), 0)
    largest = np.where(alive, np.exp(rng.normal(1.2, 0.7, n)), 0)
    norm = rng.dirichlet(np.full(HEADS, 0.4), n)
    dfa = norm * rng.normal(0.5, 0.4, (n, HEADS))
    share = np.abs(dfa) / np.abs(dfa).sum(1, keepdims=True)
    first = layer * n + 1
    none = [None] * n
    columns: dict[str, Sequence[Any]] = {
        "id": range(first, first + n),
        "harvest_id": [layer + 1] * n,
        "idx": range(n),
        "n_fired": (density * 1e7).astype(int).tolist(),
        "density": density.tolist(),
        "max_act": largest.tolist(),
        "mean_act": (largest * rng.uniform(0.2, 0.6, n)).tolist(),
        "top_head": norm.argmax(1).tolist(),
        "top_head_share": norm.max(1).tolist(),
        "top_head_dfa": _where(alive, share.argmax(1)),
        "top_head_dfa_share": _where(alive, share.max(1)),
        "distance": _where(alive, rng.gamma(2, 8, n)),
        "family": [
            FAMILIES[i] if lives else None for i, lives in zip(rng.integers(0, len(FAMILIES), n).tolist(), alive, strict=True)
        ],
        "family_score": none,
        "shuffle_key": rng.integers(0, 2**31, n).tolist(),
    }
    _load(session, Feature, tuple(columns), zip(*columns.values(), strict=True))
    live = np.flatnonzero(alive).tolist()
    names = ("harvest_id", "head", "idx", "norm_share", "dfa", "dfa_share")
    for head in range(HEADS):
        values = (norm[alive, head].tolist(), dfa[alive, head].tolist(), share[alive, head].tolist())
        _load(session, FeatureHead, names, zip([layer + 1] * len(live), [head] * len(live), live, *values, strict=True))
    if layer < DEEP:
        _deep(session, layer, n, first, rng)


def _where(alive: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> list[Any]:
    return [value if lives else None for value, lives in zip(values.tolist(), alive, strict=True)]


def _deep(session: Session, layer: int, n: int, first: int, rng: np.random.Generator) -> None:
    """Details, rows of text, the strongest example of each feature, and tokens to search."""
    harvest, zeros = layer + 1, pack(np.zeros(HEADS), F4)
    tokens = [[[i, f" w{i}", 1.0] for i in rng.integers(0, VOCABULARY, 10).tolist()] for _ in range(64)]
    empty: dict[str, Any] = {"histogram": {}, "bands": [], "neighbours": [], "evidence": {}, "suppressed": []}
    empty |= {"families": [], "logits": {}, "positions": [], "coactive": {}, "sample": {}}
    shares = dict.fromkeys(("head_norm", "head_dfa", "head_dfa_std"), zeros)
    for begin in range(0, n, 5000):
        session.execute(
            sa.insert(FeatureDetail),
            [
                {"feature_id": first + i, "promoted": tokens[i % 64], "verdict": None, **empty, **shares}
                for i in range(begin, min(n, begin + 5000))
            ],
        )
    frequent = np.arange(1, len(WORDS) + VOCABULARY + 1) ** -0.9
    said = rng.choice(len(frequent), (ROWS, CONTEXT), p=frequent / frequent.sum())
    vocabulary = [f" {word}" for word in WORDS] + [f" w{i}" for i in range(VOCABULARY)]
    texts = [[vocabulary[i] for i in row] for row in said.tolist()]
    ids = pack(np.zeros(CONTEXT), I4)
    at = layer * ROWS + 1
    session.execute(
        sa.insert(Context),
        [{"id": at + i, "harvest_id": harvest, "row": i, "tokens": ids, "texts": row} for i, row in enumerate(texts)],
    )
    packed = _packed_dfa()
    where, dest = rng.integers(0, ROWS, n).tolist(), rng.integers(8, CONTEXT - 4, n).tolist()
    names = ("feature_id", "context_id", "band", "rank", "dest", "start", "act", "acts", "dfa")
    rows = ((first + i, at + where[i], 0, 0, dest[i], 0, 5.0, b"", packed[dest[i]]) for i in range(n))
    _load(session, Example, names, rows)
    session.add(HarvestPart(harvest_id=harvest, part="search tokens"))
    known = {text: number for number, text in enumerate(dict.fromkeys(vocabulary), 1)}
    numbers = np.array([known[text] for text in vocabulary])
    names = ("harvest_id", "kind", "token_id", "weight", "idx", "n")
    for kind, each in ((search.FIRES, 12), (search.PROMOTES, 10), (search.SUPPRESSES, 10)):
        drawn = numbers[rng.choice(len(frequent), (n, each), p=frequent / frequent.sum())]
        weight = rng.gamma(2, 1.5, (n, each))
        order = np.lexsort((weight.ravel(), drawn.ravel()))
        of = np.repeat(np.arange(n), each)[order]
        parts = (drawn.ravel()[order].tolist(), weight.ravel()[order].tolist(), of.tolist())
        _load(session, FeatureToken, names, ((harvest, kind, t, w, i, 1) for t, w, i in zip(*parts, strict=True)))


def _packed_dfa() -> list[bytes]:
    """A packed DFA of some twenty entries for each destination."""
    from types import SimpleNamespace

    from server.packing import pack_dfa

    rng = np.random.default_rng(0)
    made = []
    for dest in range(CONTEXT):
        n = min(20, dest + 1)
        left = np.full(HEADS, 0.01)
        made.append(
            SimpleNamespace(
                start=0, dest=dest, dfa_src=np.arange(n), dfa_head=rng.integers(0, HEADS, n), dfa_value=rng.gamma(1, 0.4, n),
                dropped=left, before=0 * left, preact=1.0, bias=0.0, abs_dfa=1.0,
            )
        )  # fmt: skip
    return pack_dfa(made)


def _load(session: Session, table: Any, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Straight through the driver; on PostgreSQL by COPY."""
    connection, columns = session.connection(), ", ".join(names)
    name = table.__tablename__
    if connection.dialect.name == "postgresql":
        cursor: Any = connection.connection.cursor()
        with cursor, cursor.copy(f"COPY {name} ({columns}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        return
    driver: Any = connection.connection.driver_connection
    marks = ", ".join("?" * len(names))
    driver.executemany(f"INSERT INTO {name} ({columns}) VALUES ({marks})", rows)
