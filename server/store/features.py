"""The feature table and the feature page."""

import math
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import groupby, islice
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self, overload
from urllib.parse import parse_qsl, urlencode

import numpy as np
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema, field_validator, model_validator
from sqlalchemy.orm import Session
from typing_extensions import TypedDict  # before Python 3.12 pydantic needs this one

from sae_core.errors import NotFound, Unfitting, UsageError
from sae_core.records import head_agreement
from server.packing import F4, Floats, Ints, Packed, read_examples, unfold, unpack
from server.store.labels import shown_label
from server.store.saes import Door, SaeRef
from server.store.walk import NAMES, Place, Walk
from server.tables import Context, Example, Feature, FeatureDetail, FeatureHead, Harvest

SortKey = Literal["idx", "density", "max", "mean", "head_share", "dfa_share", "distance", "family"]
SORT_KEYS: tuple[SortKey, ...] = ("idx", "density", "max", "mean", "head_share", "dfa_share", "distance", "family")


class FeatureFilter(BaseModel):
    """Which features are meant, in which order."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    sort: str | None = Field(None, json_schema_extra={"enum": [*SORT_KEYS, *(f"-{key}" for key in SORT_KEYS), None]})
    """Column to sort by; a leading `-` turns the order round. Without it: `-head_share` when a head is given, else `-max`."""
    head: int | None = Field(None, ge=0)
    """Show and sort shares of this head; without it, of each feature's leading head."""
    leads: bool = False
    """Only features whose decoder norm is largest at `head`."""
    leads_dfa: bool = False
    """Only features whose |mean DFA| is largest at `head`."""
    min_density: float | None = Field(None, ge=0, le=1)
    """Only features that fire on at least this share of tokens."""
    max_density: float | None = Field(None, ge=0, le=1)
    """Only features that fire on at most this share of tokens."""
    min_max: float | None = Field(None, allow_inf_nan=False)
    """Only features whose strongest activation is at least this."""
    max_max: float | None = Field(None, allow_inf_nan=False)
    """Only features whose strongest activation is at most this."""
    min_share: float | None = Field(None, ge=0, le=1)
    """Only features of whose decoder's norm at least this share lies at `head`, or without one at their leading head."""
    min_dfa_share: float | None = Field(None, ge=0, le=1)
    """The same by data: the head's share of |mean DFA|."""
    family: str | None = Field(None, max_length=30)
    """Only features of this family; `unclear` for those of none."""
    dead: bool | None = None
    """True: only features that never fired; false: only those that did."""
    labelled: bool | None = None
    """True: only features with a label; false: only those without."""
    label: str | None = Field(None, max_length=200)
    """Only features with a label that contains this, in upper or lower case."""
    in_list: int | None = Field(None, ge=1, lt=2**31)
    """Only features in the list of this id."""

    @field_validator("sort")
    @classmethod
    def _known_sort(cls, sort: str | None) -> str | None:
        if sort is not None and sort.removeprefix("-") not in SORT_KEYS:
            raise ValueError(f"there is no column '{sort.removeprefix('-')}' to sort by; the columns are {', '.join(SORT_KEYS)}")
        return sort

    @model_validator(mode="after")
    def _has_its_head(self) -> Self:
        if (self.leads or self.leads_dfa) and self.head is None:
            raise Unfitting(f"`{'leads' if self.leads else 'leads_dfa'}` needs a head: add head=0, for example", field="head")
        return self

    @property
    def order(self) -> str:
        """`sort`, decided."""
        return self.sort or ("-max" if self.head is None else "-head_share")

    @property
    def key(self) -> str:
        """The column, without its direction."""
        return self.order.removeprefix("-")

    @property
    def descending(self) -> bool:
        """Largest first."""
        return self.order.startswith("-")

    @cached_property
    def _given(self) -> dict[str, Any]:
        return self.model_dump(exclude_defaults=True)  # a page of the table asks a score of times

    def asked(self, **changes: Any) -> dict[str, Any]:
        """What differs from the defaults, ready for an address. Any change begins at the first page, unless it names another."""
        here = {} if not changes else {"after": None, "before": None}
        values = {**self._given, **here, **changes}
        return {key: str(value).lower() if isinstance(value, bool) else value for key, value in values.items()}


class TablePart(FeatureFilter):
    """What part of the feature table is asked for."""

    after: str | None = Field(None, max_length=200)
    """Where the page before this one ended."""
    before: str | None = Field(None, max_length=200)
    """Where the page after this one begins; `after` goes first."""
    limit: int = Field(50, ge=1, le=200)
    """Rows on a page."""


class FeatureQuery(TablePart):
    """The same, as a form sends it. The address of the page is exactly this."""

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, given: Any) -> Any:
        # A form sends an untouched field as an empty string.
        return {key: value for key, value in given.items() if value != ""} if isinstance(given, dict) else given

    @property
    def selection(self) -> str | None:
        """Filters and order as one value, for the address of a feature's page; None where all is asked."""
        asked = self.asked(after=None, before=None, limit=None)
        return urlencode({key: value for key, value in asked.items() if value is not None}) or None

    @classmethod
    def of_selection(cls, text: str | None) -> "FeatureQuery":
        """What `selection` made; UsageError for anything else."""
        try:
            return cls.model_validate(dict(parse_qsl(text or "", max_num_fields=30)))
        except ValueError as error:
            raise UsageError(f"'{text}' selects no features; go back to the table.", field="from") from error


EXAMPLE_COLUMNS = (
    Example.feature_id, Example.band, Example.rank, Example.dest, Example.start, Example.act, Example.acts, Example.dfa,
    Context.row, Context.texts,
)  # fmt: skip


class Stored(Packed, Protocol):
    """An example's columns, and its row's."""

    band: int
    rank: int
    row: int
    texts: Sequence[str]


@dataclass(frozen=True)
class Snippet:
    """The strongest example in a few words: text before the destination, the destination, text after."""

    before: str
    """Some tokens before the destination."""
    token: str
    """The destination."""
    after: str
    """Some tokens after it."""
    source: str | None
    """The source token with the largest DFA, heads summed."""
    source_offset: int | None
    """Its position less the destination's."""


@dataclass(frozen=True)
class FeatureRow:
    """A line of the feature table."""

    index: int
    family: str | None
    verdict: str | None
    """The family in words."""
    n_fired: int
    density: float
    max_act: float
    mean_act: float
    head: int
    """The head asked for, else the one with the largest decoder norm."""
    head_share: float
    """Share of the decoder's norm that lies at `head`."""
    dfa_head: int | None
    """The head asked for, else the one with the largest |mean DFA|."""
    dfa_share: float | None
    """Share of |mean DFA| that lies at `dfa_head`."""
    dfa: float | None
    """Mean signed DFA of the head asked for."""
    distance: float | None
    """Mean number of tokens back to the source."""
    promoted: tuple[str, ...]
    snippet: Snippet | None
    """Null where no example was kept."""
    label: str | None
    """What people, or else a method, call it."""


@dataclass(frozen=True)
class FeatureTable:
    """A page of the feature table."""

    query: TablePart
    """What was asked, with defaults filled in."""
    n_matching: int
    """Features that the filters select, on all pages."""
    rows: tuple[FeatureRow, ...]
    """The features of this page, in the order asked for."""
    next: str | None
    """Cursor for the page after this one; None on the last."""
    previous: str | None
    """Cursor for the page before this one; None on the first."""


def walk_of(door: Door, query: FeatureFilter) -> Walk:
    """The way through the table that `query` asks for."""
    if query.head is not None and query.head >= door.sae.n_heads:
        raise UsageError(
            f"Head {query.head} does not exist: {door.sae.name} has heads 0 to {door.sae.n_heads - 1}.", field="head"
        )
    return Walk(door, query, query.key, query.descending)


def feature_table(session: Session, door: Door, query: TablePart) -> FeatureTable:
    """The part of the table that `query` asks for, by keyset, so that a deep page costs what the first does."""
    walk = walk_of(door, query)
    if door.sae.harvest is None:
        return FeatureTable(query, 0, (), None, None)
    mark = query.after if query.after is not None else query.before
    start = None if mark is None else Place.read(mark, query.key)
    backward = start is not None and query.after is None
    found = walk.from_(session, start, query.limit + 1, backward=backward)
    shown, more = found[: query.limit], len(found) > query.limit
    if backward:
        shown.reverse()
    there = bool(shown)
    return FeatureTable(
        query=query,
        n_matching=len(shown) if start is None and not more else walk.count(session),
        rows=feature_rows(session, door, query.head, [place.idx for place in shown]),
        next=str(shown[-1]) if there and (more or backward) else None,
        previous=str(shown[0]) if there and (start is not None if not backward else more) else None,
    )


def _line_statement(head: bool) -> sa.Select[Any]:
    """What the table's lines tell: with the shares of one `head`, or of each feature's leading heads. Made once and of columns
    alone, as the page's."""
    feature, detail, shares = (table.__table__ for table in (Feature, FeatureDetail, FeatureHead))
    example, context = Example.__table__, Context.__table__
    strongest = sa.and_(example.c.feature_id == feature.c.id, example.c.band == 0, example.c.rank == 0)
    tables = feature.join(detail, detail.c.feature_id == feature.c.id).outerjoin(example, strongest)
    tables = tables.outerjoin(context, context.c.id == example.c.context_id)
    leads: tuple[Any, ...] = (
        feature.c.top_head,
        feature.c.top_head_share,
        feature.c.top_head_dfa,
        feature.c.top_head_dfa_share,
        sa.null(),
    )
    if head:
        asked = sa.bindparam("head", type_=sa.Integer)
        here = sa.and_(shares.c.harvest_id == feature.c.harvest_id, shares.c.head == asked, shares.c.idx == feature.c.idx)
        tables = tables.outerjoin(shares, here)
        leads = (asked, shares.c.norm_share, asked, shares.c.dfa_share, shares.c.dfa)
    names = ("head", "head_share", "dfa_head", "dfa_share", "mean_dfa")
    label = shown_label(sa.bindparam("sae"), feature.c.idx).label("label")
    told = [feature.c[name] for name in ("idx", "family", "n_fired", "density", "max_act", "mean_act", "distance")]
    packed = [example.c[name] for name in ("dest", "start", "act", "dfa")]
    wanted = feature.c.idx.in_(sa.bindparam("wanted", expanding=True))
    return (
        sa.select(*told, *(column.label(name) for column, name in zip(leads, names, strict=True)), detail.c.promoted)
        .add_columns(detail.c.verdict, label, *packed, sa.literal(b"", sa.LargeBinary).label("acts"), context.c.texts)
        .select_from(tables)
        .where(feature.c.harvest_id == sa.bindparam("harvest"), wanted)
    )


_LINES = {head: _line_statement(head) for head in (False, True)}


def feature_rows(session: Session, door: Door, head: int | None, wanted: Sequence[int]) -> tuple[FeatureRow, ...]:
    """The lines of the features `wanted`, in their order: one query."""
    if door.sae.harvest is None or not wanted:
        return ()
    asked = {"sae": door.id, "harvest": door.sae.harvest.id, "wanted": wanted}
    at = {} if head is None else {"head": head}
    rows = session.connection().execute(_LINES[head is not None], asked | at).all()
    known = [row for row in rows if row.dest is not None]
    snippets = dict(zip((row.idx for row in known), _snippets(known), strict=True))
    lines = {row.idx: _feature_row(row, snippets.get(row.idx)) for row in rows}
    return tuple(lines[idx] for idx in wanted if idx in lines)


def _feature_row(row: sa.Row[Any], snippet: Snippet | None) -> FeatureRow:
    return FeatureRow(
        index=row.idx,
        family=row.family,
        verdict=row.verdict,
        n_fired=row.n_fired,
        density=row.density,
        max_act=row.max_act,
        mean_act=row.mean_act,
        head=row.head,
        head_share=row.head_share,
        dfa_head=row.dfa_head,
        dfa_share=row.dfa_share,
        dfa=row.mean_dfa,
        distance=row.distance,
        promoted=tuple(text for _, text, _ in row.promoted[:4]),
        snippet=snippet,
        label=row.label,
    )


def _snippets(rows: Sequence[sa.Row[Any]]) -> list[Snippet]:
    """Of rows with an example and its row's texts."""
    if not rows:
        return []
    found = read_examples(rows)
    # What each example was given by source, heads summed: [rows, positions]. Zero where nothing is known.
    width = max(row.dest for row in rows) + 1
    whose = np.repeat(np.arange(len(rows)), np.diff(found.end, prepend=0))
    by_source = np.bincount(whose * width + found.src, found.value, len(rows) * width).reshape(len(rows), width)
    made = []
    for row, most, given in zip(rows, by_source.argmax(1).tolist(), by_source.max(1).tolist(), strict=True):
        dest, texts = row.dest, row.texts
        made.append(
            Snippet(
                before="".join(texts[max(0, dest - 10) : dest]),
                token=texts[dest],
                after="".join(texts[dest + 1 : dest + 4]),
                source=texts[most] if given > 0 else None,
                source_offset=most - dest if given > 0 else None,
            )
        )
    return made


PerhapsUnknown = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}, mode="serialization")]
"""Not a number where it is not known, which JSON has as null."""


@dataclass(frozen=True)
class HeadShare:
    """A head's part in a feature."""

    head: int
    norm_share: float
    """Norm of the decoder's slice at this head, over the sum of all heads' norms."""
    dfa: PerhapsUnknown
    """Mean signed DFA over every firing; not a number, here and below, and null in JSON, where an import does not say it."""
    dfa_std: PerhapsUnknown
    """Its spread over firings."""
    dfa_share: PerhapsUnknown
    """|mean DFA| over the sum of all heads' |mean DFA|."""


@dataclass(frozen=True)
class Band:
    """A range of activation, and how many firings fell in it."""

    low: float
    high: float
    count: int
    """Firings between the two."""


@dataclass(frozen=True)
class TokenWeight:
    """A token and how strongly the feature promotes it."""

    id: int
    """Id of the token in the model's vocabulary."""
    text: str
    """The token as shown."""
    value: float
    """What the feature adds to the token's logit for each unit of activation: below 0 where it suppresses it."""


@dataclass(frozen=True)
class Neighbour:
    """A feature whose decoder direction is near."""

    index: int
    cosine: float
    """Of the two decoder directions."""
    max_act: float
    family: str | None
    promoted: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """An example of the page."""

    band: int
    rank: int


@dataclass(frozen=True)
class FamilyVerdict:
    """A family that holds for the feature."""

    family: str
    """Its name."""
    score: float
    """How clearly, 0 to 1."""
    examples: tuple[Reference, ...]
    """Some of those that show it."""


@dataclass(frozen=True)
class PositionBucket:
    """Firings at the positions `low` to `high` of the row."""

    low: int
    """First position, counted from the row's start."""
    high: int
    """Last position."""
    firings: int
    """Firings there."""
    tokens: int
    """Tokens swept there."""
    mean_act: float
    """Mean activation of those firings."""


@dataclass(frozen=True)
class Partner:
    """A feature that fires on the same tokens."""

    index: int
    both: int
    """Tokens of the sample on which both fire."""
    correlation: float
    """Of the two firing or not."""
    family: str | None
    promoted: tuple[str, ...]


class DfaEntry(NamedTuple):
    """What one (source, head) pair gave to the feature at the example's destination."""

    src: int
    head: int
    value: float


class DfaJson(TypedDict):
    """A `DfaEntry` as JSON has it."""

    src: int
    """Position of the source token, counted from the row's start."""
    head: int
    value: float
    """Signed DFA: what it gave to the pre-activation."""


class DfaColumns(Sequence[DfaEntry]):
    """The entries of an example as they were stored: three arrays. A page looks at hundreds only through their sums, and making
    each of them an object took longer than reading them."""

    __slots__ = ("head", "src", "value")

    def __init__(self, src: Ints, head: Ints, value: Floats) -> None:
        self.src, self.head, self.value = src, head, value

    @classmethod
    def of(cls, entries: Sequence[DfaEntry]) -> Self:
        """The same from entries one by one."""
        src, head, value = zip(*entries, strict=True) if entries else ((), (), ())
        return cls(np.array(src, np.int64), np.array(head, np.int64), np.array(value, np.float64))

    def __len__(self) -> int:
        return len(self.src)

    def __iter__(self) -> Iterator[DfaEntry]:
        columns = zip(self.src.tolist(), self.head.tolist(), self.value.tolist(), strict=True)
        return map(partial(tuple.__new__, DfaEntry), columns)  # without a call of Python for each

    @overload
    def __getitem__(self, at: int) -> DfaEntry: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[DfaEntry, ...]: ...
    def __getitem__(self, at: int | slice) -> DfaEntry | tuple[DfaEntry, ...]:
        if isinstance(at, slice):
            return tuple(DfaColumns(self.src[at], self.head[at], self.value[at]))
        return DfaEntry(int(self.src[at]), int(self.head[at]), float(self.value[at]))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, tuple | DfaColumns) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def columns(entries: Sequence[Sequence[DfaEntry]]) -> tuple[Ints, Ints, Floats]:
    """Source, head and value of all entries, one example after the other."""
    stored = [each if isinstance(each, DfaColumns) else DfaColumns.of(each) for each in entries]
    return (
        np.concatenate([each.src for each in stored]),
        np.concatenate([each.head for each in stored]),
        np.concatenate([each.value for each in stored]),
    )


def _as_json(entries: Sequence[DfaEntry]) -> list[DfaJson]:
    return [{"src": src, "head": head, "value": value} for src, head, value in entries]


DfaEntries = Annotated[Sequence[DfaEntry], PlainSerializer(_as_json)]
"""Objects in JSON, and quick to make here."""


@dataclass(frozen=True)
class FeatureExample:
    """A row where the feature fired, taken apart at one destination. Positions count from the row's start."""

    band: int
    """0: the strongest examples; 1 and up: drawn from the bands of activation, strongest band first."""
    rank: int
    row: int
    start: int
    """Position of the first token in `texts`."""
    dest: int
    texts: tuple[str, ...]
    acts: dict[int, float]
    """Position -> activation, where it is not zero."""
    dfa: DfaEntries
    """The largest entries."""
    dropped: tuple[float, ...]
    """Per head, the sum of the entries that are not listed."""
    before: tuple[float, ...]
    """Per head, the sum over sources before the first token shown."""
    abs_dfa: float
    """Sum of |DFA| over all heads and sources."""
    dfa_sum: float
    """Sum of everything above: listed, dropped, before."""
    bias: float
    """The SAE's own: c of its affine map."""
    preact: float
    """The pre-activation, computed on its own from the hooked z."""
    act: float
    """Activation at the destination."""
    gap: float
    """|dfa_sum + bias - preact| / (abs_dfa + |bias|), from the numbers as stored."""
    attributed: Literal["heads", "heads summed", "none"] = "heads"
    """How much is known of its DFA. Summed, as imported ones may be: `dfa` has one head that stands for all, and `bias` is what
    is left of the activation. None: the numbers from `dfa` on say nothing."""

    @property
    def by_head(self) -> list[float]:
        """DFA of each head, sources summed."""
        sums = [a + b for a, b in zip(self.dropped, self.before, strict=True)]
        for _, head, value in self.dfa:
            sums[head] += value
        return sums


@dataclass(frozen=True)
class FeatureNumbers:
    """What is said of a feature first, whoever asks."""

    sae: SaeRef | str
    index: int
    label: str | None
    """What people, or else a method, call it."""
    n_fired: int
    density: float
    max_act: float
    mean_act: float
    distance: float | None
    """Mean number of tokens back to the source, weighted by positive DFA over the examples, row start left out."""
    family: str | None
    """The most specific of the families that hold; null where none does."""
    family_score: float | None
    """How clearly `family` holds, 0 to 1."""
    verdict: str | None
    """The family in words."""


@dataclass(frozen=True)
class FeaturePage(FeatureNumbers):
    """All that a feature's page shows."""

    sae: SaeRef
    families: tuple[FamilyVerdict, ...]
    """All that hold, clearest first."""
    evidence: dict[str, Any]
    heads: tuple[HeadShare, ...]
    agreement: float | None
    """Of the heads' two shares, 0 to 1: 1 - sum |norm share - DFA share| / 2. None when dead."""
    histogram_edges: tuple[float, ...]
    histogram_counts: tuple[int, ...]
    bands: tuple[Band, ...]
    promoted: tuple[TokenWeight, ...]
    suppressed: tuple[TokenWeight, ...]
    logit_edges: tuple[float, ...]
    logit_counts: tuple[int, ...]
    """Tokens of the vocabulary by how much the feature promotes them; empty in harvests before these were kept."""
    positions: tuple[PositionBucket, ...]
    coactive_tokens: int
    """Tokens in the sample that `coactive` counts on."""
    coactive: tuple[Partner, ...]
    """Those that fire with it, most correlated first."""
    sample: dict[str, Any]
    """Of the kept examples, a sample of the firings: where DFA comes from by distance, and how it is spread."""
    neighbours: tuple[Neighbour, ...]
    examples: tuple[FeatureExample, ...]
    """The first `AT_ONCE`, or all that were kept."""
    kept: int | None
    """How many were kept, where `examples` are not all."""
    previous: int | None
    next: int | None

    def shows(self, place: Reference) -> bool:
        """Whether that example is among `examples`."""
        return any((example.band, example.rank) == (place.band, place.rank) for example in self.examples)


AT_ONCE = 20
"""Examples that a feature's page begins with: from every band, and the strongest."""


_ALL = 2**31 - 1


OF_PARTS: Mapping[str, tuple[str, ...]] = {
    "heads": ("head_norm", "head_dfa", "head_dfa_std"),
    "logits": ("promoted", "suppressed", "logits"),
    "families": ("families", "evidence", "sample"),
    "activations": ("histogram", "bands", "positions"),
    "others": ("neighbours", "coactive"),
}
"""Parts of a feature that scripts ask for, and the columns that they are made of: reading all takes several times as long as
reading one."""


class _Statements(NamedTuple):
    """What a page asks: for the features, for the examples of features by their ids."""

    pages: sa.Select[Any]
    examples: sa.Select[Any]


@lru_cache
def _statements(many: bool, parts: frozenset[str]) -> _Statements:
    """Of the features in `parts`. Made once and of columns alone, since making a statement, and objects of the ORM, took longer
    than the database does; of one feature apart from many, since a list has to be written into the statement anew each time."""
    left_out = {name for part, names in OF_PARTS.items() if part not in parts for name in names}
    feature, detail = sa.inspect(Feature).local_table.c, sa.inspect(FeatureDetail).local_table.c
    example, context = sa.inspect(Example).local_table.c, sa.inspect(Context).local_table.c

    def asked(column: sa.ColumnElement[Any], name: str) -> sa.ColumnElement[bool]:
        return column.in_(sa.bindparam(name, expanding=True)) if many else column == sa.bindparam(name)

    label = shown_label(sa.bindparam("sae"), feature.idx).label("label")
    told = (sa.null().label(of.name) if of.name in left_out else of for of in detail if of.name != "feature_id")
    pages = sa.select(*feature, *told, label).where(
        detail.feature_id == feature.id, feature.harvest_id == sa.bindparam("harvest"), asked(feature.idx, "wanted")
    )
    of_these = asked(example.feature_id, "features")
    counted = sa.select(example.feature_id, sa.func.count().label("kept")).where(of_these).group_by(example.feature_id).subquery()
    places = ("feature_id", "band", "rank", "dest", "start", "act", "acts", "dfa")
    first = example.rank < sa.case((example.band == 0, sa.bindparam("strongest")), else_=sa.bindparam("of_each"))
    examples = (
        sa.select(*(example[name] for name in places), context.row, context.texts, counted.c.kept)
        .where(of_these, first, context.id == example.context_id, counted.c.feature_id == example.feature_id)
        .order_by(example.feature_id, example.band, example.rank)
    )
    return _Statements(pages, examples)


def _others_statement() -> sa.Select[Any]:
    feature, detail = sa.inspect(Feature).local_table.c, sa.inspect(FeatureDetail).local_table.c
    wanted = feature.idx.in_(sa.bindparam("wanted", expanding=True))
    told = sa.select(feature.idx, feature.max_act, feature.family, detail.promoted)
    return told.where(detail.feature_id == feature.id, feature.harvest_id == sa.bindparam("harvest"), wanted)


_OTHERS = _others_statement()


def feature_page(session: Session, door: Door, index: int, *, every: bool = False, others: bool = True) -> FeaturePage:
    """The page of feature `index` of the published harvest, with its first or with `every` example: three queries after the
    door's one, two where it tells of no `others`."""
    check_index(door, index)
    pages = feature_pages(session, door, [index], every=every, others=others)
    if not pages:
        _published(door)
        raise NotFound(f"Feature {index} of {door.sae.name} is not in its published harvest.", field="index")
    return pages[0]


def feature_pages(
    session: Session,
    door: Door,
    wanted: Sequence[int],
    *,
    every: bool = False,
    others: bool = True,
    examples: bool = True,
    parts: Collection[str] = tuple(OF_PARTS),
) -> tuple[FeaturePage, ...]:
    """The pages of the features `wanted` that are there, in their order: three queries, however many. Without `others` they
    tell of no other features, without `examples` of none; each of these saves a query. Other `parts` than are named are empty."""
    if door.sae.harvest is None or not wanted:
        return ()
    harvest_id, config = door.sae.harvest.id, door.sae.harvest.config
    connection = session.connection()
    others = others and "others" in parts
    read = frozenset(part for part in OF_PARTS if part in parts and (others or part != "others"))
    many = len(wanted) > 1
    asked = _statements(many, read)
    these = {"sae": door.id, "harvest": harvest_id, "wanted": wanted if many else wanted[0]}
    found = connection.execute(asked.pages, these).all()
    named = {int(idx) for row in found for idx, *_ in (*row.neighbours, *row.coactive.get("pairs", []))} if others else set()
    told = _others(connection, harvest_id, named) if named else {}
    ids = [row.id for row in found]
    shown = _examples(connection, asked.examples, ids if many else ids[0], config, every) if examples and ids else {}
    pages = {row.idx: _page(door.sae, row, told, *shown.get(row.id, ((), 0))) for row in found}
    return tuple(pages[idx] for idx in wanted if idx in pages)


def _page(
    sae: SaeRef, row: sa.Row[Any], others: dict[int, sa.Row[Any]], shown: tuple[FeatureExample, ...], kept: int
) -> FeaturePage:
    index, heads = row.idx, _head_shares(row) if row.head_norm is not None else ()
    histogram_edges, histogram_counts = unfold(row.histogram or {}, log=True)
    logit_edges, logit_counts = unfold(row.logits or {}, log=False)
    coactive = row.coactive or {}
    return FeaturePage(
        sae=sae,
        index=index,
        label=row.label,
        n_fired=row.n_fired,
        density=row.density,
        max_act=row.max_act,
        mean_act=row.mean_act,
        distance=row.distance,
        family=row.family,
        family_score=row.family_score,
        verdict=row.verdict,
        families=tuple(
            FamilyVerdict(one["family"], one["score"], tuple(Reference(*place) for place in one["examples"]))
            for one in row.families or ()
        ),
        evidence=row.evidence or {},
        heads=heads,
        agreement=head_agreement([head.norm_share for head in heads], [head.dfa for head in heads]),
        histogram_edges=histogram_edges,
        histogram_counts=histogram_counts,
        bands=tuple(Band(band["low"], band["high"], band["count"]) for band in row.bands or ()),
        promoted=tuple(TokenWeight(*entry) for entry in row.promoted or ()),
        suppressed=tuple(TokenWeight(*entry) for entry in row.suppressed or ()),
        logit_edges=logit_edges,
        logit_counts=logit_counts,
        positions=tuple(PositionBucket(*part) for part in row.positions or ()),
        coactive_tokens=coactive.get("tokens", 0),
        coactive=_partners(coactive.get("pairs", []), others),
        sample=row.sample or {},
        neighbours=_neighbours(row.neighbours or (), others),
        examples=shown,
        kept=kept if kept > len(shown) else None,
        previous=index - 1 if index > 0 else None,
        next=index + 1 if index + 1 < sae.d_sae else None,
    )


def check_index(door: Door, index: int) -> None:
    """NotFound unless the SAE has a feature of that index."""
    if not 0 <= index < door.sae.d_sae:
        raise NotFound(f"Feature {index} does not exist: {door.sae.name} has features 0 to {door.sae.d_sae - 1}.", field="index")


def _published(door: Door) -> int:
    if door.sae.harvest is None:
        raise NotFound(f"{door.sae.name} has no published harvest yet; its features appear when one is complete.", field="sae")
    return door.sae.harvest.id


def _head_shares(detail: FeatureDetail | sa.Row[Any]) -> tuple[HeadShare, ...]:
    norm = unpack(detail.head_norm, F4).tolist()
    dfa, std = (unpack(blob, F4).tolist() or [math.nan] * len(norm) for blob in (detail.head_dfa, detail.head_dfa_std))
    total = sum(abs(value) for value in dfa)
    return tuple(
        HeadShare(head, share, mean, spread, abs(mean) / total if total else 0.0)
        for head, (share, mean, spread) in enumerate(zip(norm, dfa, std, strict=True))
    )


def _others(connection: sa.Connection, harvest_id: int, wanted: Iterable[int]) -> dict[int, sa.Row[Any]]:
    """What is told of other features on the page, by index."""
    return {row.idx: row for row in connection.execute(_OTHERS, {"harvest": harvest_id, "wanted": sorted(wanted)})}


def _neighbours(nearest: Sequence[Sequence[float]], others: dict[int, sa.Row[Any]]) -> tuple[Neighbour, ...]:
    known = [(others[int(idx)], cosine) for idx, cosine in nearest if int(idx) in others]
    return tuple(Neighbour(row.idx, cosine, row.max_act, row.family, _texts(row.promoted)) for row, cosine in known)


def _partners(pairs: Sequence[Sequence[float]], others: dict[int, sa.Row[Any]]) -> tuple[Partner, ...]:
    known = [(others[int(idx)], int(both), correlation) for idx, both, correlation in pairs if int(idx) in others]
    return tuple(Partner(row.idx, both, correlation, row.family, _texts(row.promoted)) for row, both, correlation in known)


def _texts(promoted: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    return tuple(text for _, text, _ in promoted[:3])


def _examples(
    connection: sa.Connection, statement: sa.Select[Any], features: Sequence[int] | int, config: dict[str, Any], every: bool
) -> dict[int, tuple[tuple[FeatureExample, ...], int]]:
    """Of each feature that has any, the examples to show, and how many there are."""
    strongest, of_each = (_ALL, _ALL) if every else first_of_bands(config)
    asked = {"features": features, "strongest": strongest, "of_each": of_each}
    window = int(config.get("window", 256))
    rows = connection.execute(statement, asked).all()
    examples = iter(taken_apart(rows, window))
    found: dict[int, tuple[tuple[FeatureExample, ...], int]] = {}
    for feature_id, mine in groupby(rows, attrgetter("feature_id")):
        many = list(mine)
        found[feature_id] = (tuple(islice(examples, len(many))), many[0].kept)
    return found


def first_of_bands(config: dict[str, Any]) -> tuple[int, int]:
    """How many of the strongest, and how many of each band, make the first `AT_ONCE`; `config` is the harvest's."""
    bands, per_band = int(config.get("bands", 4)), int(config.get("per_band", 5))
    of_each = min(per_band, max(1, AT_ONCE * 3 // 5 // bands)) if bands else 0
    return max(1, AT_ONCE - bands * of_each), of_each


def taken_apart(rows: Sequence[Stored], window: int) -> tuple[FeatureExample, ...]:
    """Rows of examples as pages show them, at most `window` tokens of each: read together, since that is much quicker."""
    found = read_examples(rows)
    acts = list(zip(found.acts_pos.tolist(), found.acts_value.tolist(), strict=True))
    src, head, value = found.src, found.head, found.value
    dropped, before = found.dropped.tolist(), found.before.tolist()
    ends = zip(found.acts_end.tolist(), found.end.tolist(), found.heads_end.tolist(), strict=True)
    sums = zip(*(part.tolist() for part in (found.abs_dfa, found.total, found.bias, found.preact, found.gap)), strict=True)
    made, a, e, h = [], 0, 0, 0
    for row, (a_end, e_end, h_end), (abs_dfa, total, bias, preact, gap) in zip(rows, ends, sums, strict=True):
        dest, start = row.dest, row.start
        made.append(
            FeatureExample(
                band=row.band,
                rank=row.rank,
                row=row.row,
                start=start,
                dest=dest,
                texts=tuple(row.texts[start : start + window]),
                acts=dict(sorted([*acts[a:a_end], (dest, row.act)])) if a_end > a else {dest: row.act},
                dfa=DfaColumns(src[e:e_end], head[e:e_end], value[e:e_end]),
                dropped=tuple(dropped[h:h_end]),
                before=tuple(before[h:h_end]),
                abs_dfa=abs_dfa,
                dfa_sum=total,
                bias=bias,
                preact=preact,
                act=row.act,
                gap=gap,
                attributed="heads" if h_end - h > 1 else "heads summed" if h_end > h else "none",
            )
        )
        a, e, h = a_end, e_end, h_end
    return tuple(made)


@dataclass(frozen=True)
class FeatureCard:
    """A feature in little: what one wants to see of it among others."""

    index: int
    n_fired: int
    density: float
    """Share of tokens on which it fires."""
    max_act: float
    family: str | None
    heads: tuple[HeadShare, ...]
    promoted: tuple[str, ...]
    examples: tuple[FeatureExample, ...]
    """The strongest."""


def feature_cards(session: Session, wanted: Sequence[tuple[int, int]], n_examples: int) -> dict[tuple[int, int], FeatureCard]:
    """Cards of the features `wanted`, as (harvest, index) pairs: two queries however many."""
    if not wanted:
        return {}
    rows = session.execute(
        sa.select(Feature, FeatureDetail, Harvest.config)
        .join(FeatureDetail, FeatureDetail.feature_id == Feature.id)
        .join(Harvest, Harvest.id == Feature.harvest_id)
        .where(sa.tuple_(Feature.harvest_id, Feature.idx).in_(wanted))
    ).all()
    windows = {feature.id: int(config.get("window", 256)) for feature, _, config in rows}
    examples: dict[int, tuple[FeatureExample, ...]] = {}
    strongest = session.execute(
        sa.select(*EXAMPLE_COLUMNS)
        .join(Context, Context.id == Example.context_id)
        .where(Example.feature_id.in_(windows), Example.band == 0, Example.rank < n_examples)
        .order_by(Example.feature_id, Example.rank)
    )
    for feature_id, rows_of in groupby(strongest, attrgetter("feature_id")):
        examples[feature_id] = taken_apart(list(rows_of), windows[feature_id])
    return {
        (feature.harvest_id, feature.idx): FeatureCard(
            feature.idx, feature.n_fired, feature.density, feature.max_act, feature.family, _head_shares(detail),
            _texts(detail.promoted), examples.get(feature.id, ()),
        )
        for feature, detail, _ in rows
    }  # fmt: skip


def random_feature(session: Session, door: Door, query: FeatureQuery) -> int:
    """A live feature of those that `query` selects, each about equally likely: the next one after a random place in the
    shuffled order. NotFound where there is none."""
    _published(door)
    live = query if query.dead is not None else query.model_copy(update={"dead": False})
    walk = replace(walk_of(door, live), key="shuffle", descending=False)
    start = Place(secrets.randbelow(2**31), -1)
    found = walk.from_(session, start, 1) or walk.from_(session, None, 1)
    if not found:
        raise NotFound(f"No feature of {door.sae.name} that is alive is selected.", field="sae")
    return found[0].idx


def beside(session: Session, door: Door, index: int, query: FeatureQuery, *, backward: bool) -> int:
    """The feature that follows `index` in what `query` selects, in its order, or that comes before it; NotFound at the end."""
    found = walk_of(door, query).from_(session, place_of(session, door, index, query), 1, backward=backward)
    if not found:
        where = "first" if backward else "last"
        raise NotFound(f"Feature {index} is the {where} of those that the filter selects.", field="index")
    return found[0].idx


def _shares(head: int | None) -> tuple[Any, Any, Any]:
    """Columns of decoder norm share, DFA share and mean DFA: at `head`, or of each feature's leading heads."""
    if head is None:
        return Feature.top_head_share, Feature.top_head_dfa_share, sa.null()
    return FeatureHead.norm_share, FeatureHead.dfa_share, FeatureHead.dfa


def place_of(session: Session, door: Door, index: int, query: FeatureQuery) -> Place:
    """Where feature `index` stands in the order of `query`."""
    harvest_id = _published(door)
    norm_share, dfa_share, _ = _shares(query.head)
    shares: dict[str, Any] = {"head_share": norm_share, "dfa_share": dfa_share}
    value = shares[query.key] if query.key in shares else getattr(Feature, NAMES.get(query.key, query.key))
    statement = sa.select(value, Feature.idx).where(Feature.harvest_id == harvest_id, Feature.idx == index)
    if query.head is not None:
        at_head = sa.and_(FeatureHead.harvest_id == harvest_id, FeatureHead.head == query.head, FeatureHead.idx == Feature.idx)
        statement = statement.outerjoin(FeatureHead, at_head)
    here = session.execute(statement).one_or_none()
    if here is None:
        raise NotFound(f"Feature {index} of {door.sae.name} is not in its published harvest.", field="index")
    return Place(*here)
