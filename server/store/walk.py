"""Ways through a harvest's features: in the order of a column, from a place on, forth or back, over what a filter selects.

What no filter narrows follows an index and stops. With filters the next `REACH` features of the order are looked at first,
which is enough wherever a fair share of them fits. Where too few do, one pass over the harvest's own rows, which lie
together, finds the rest. So a page costs at most one pass over one harvest, whatever is asked, and no index is needed for
each pair of a sort and a filter. On SQLite, which keeps no statistics, the pass is told to take the rows in their order, and
to look a head's shares up by them: the other way round each row lies elsewhere, and a pass takes eight times as long. What a
filter asks of one column alone is counted in that column's index, and what it asks of a head alone in the head's.
"""

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session

from sae_core.errors import UsageError
from server.store.kept import kept
from server.store.labels import labelled, listed
from server.store.saes import Door
from server.tables import Feature, FeatureHead

if TYPE_CHECKING:
    from server.store.features import FeatureFilter

LARGEST_BITS = 31
"""Of an index, which both databases hold in 32 bits with its sign."""
REACH = 2000
"""Features of the order that are looked at before all are."""
IN_ORDER = "INDEXED BY sqlite_autoindex_feature_1"
"""SQLite's own name for the index of UNIQUE (harvest_id, idx): the order in which the rows were written."""
NAMES = {"max": "max_act", "mean": "mean_act", "head_share": "norm_share", "shuffle": "shuffle_key"}
"""Sort keys that are called otherwise in the database."""
ALWAYS = ("idx", "density", "max", "mean", "head_share")
"""Columns that have a value for every feature."""
INDEXED = ("density", "max_act", "norm_share", "dfa_share", "family")
"""Columns of conditions that stand in an index with the feature, of the table or of a head."""
OF_HEAD = ("idx", "norm_share", "dfa_share")
"""Columns that a head's own table has."""
MAY_MISS = ("dfa_share", "distance", "family")
"""Columns that have no value for some features; those come last, whichever way the order goes."""


class InOrder(sa.Join):
    """A join that is taken as it is written, from left to right; SQLite alone needs to be told."""

    inherit_cache = True


@compiles(InOrder, "sqlite")
def _as_written(join: InOrder, compiler: Any, **how: Any) -> str:
    left, right = (compiler.process(table, **how | {"asfrom": True}) for table in (join.left, join.right))
    return f"{left} CROSS JOIN {right} ON {compiler.process(join.onclause, **how | {'asfrom': False})}"


class Place(NamedTuple):
    """Where a feature stands in an order."""

    value: float | str | None
    idx: int

    def __str__(self) -> str:
        # repr of a float reads back as the very same float.
        value = "" if self.value is None else self.value if isinstance(self.value, str) else repr(self.value)
        return f"{value}~{self.idx}"

    @classmethod
    def read(cls, text: str, key: str) -> "Place":
        """The place that an address names; UsageError when it names none."""
        value, _, index = text.rpartition("~")
        try:
            place = cls(None if value == "" else value if key == "family" else float(value), int(index))
            if place.idx.bit_length() > LARGEST_BITS or (isinstance(place.value, float) and not math.isfinite(place.value)):
                raise ValueError(f"{text} is more than a database counts to")
            if place.value is None and key in ALWAYS:
                raise ValueError(f"every feature has a value of {key}")
            return place
        except ValueError as error:
            raise UsageError(f"'{text}' is no place in this table; start again without it.", field="after") from error


@dataclass(frozen=True)
class Walk:
    """One order over one selection of a published harvest's features."""

    door: Door
    query: "FeatureFilter"
    key: str
    """The column to go by."""
    descending: bool

    @property
    def harvest_id(self) -> int:
        """Whose features they are."""
        assert self.door.sae.harvest is not None
        return self.door.sae.harvest.id

    def from_(self, session: Session, start: Place | None, limit: int, *, backward: bool = False) -> list[Place]:
        """At most `limit` places after `start` (None: from the first on), nearest first; `backward` those before it."""
        found: list[Place] = []
        for missing in self.parts(start, backward):
            within = start if start is not None and (start.value is None) == missing else None
            found += self._part(session, missing, within, limit - len(found), self.descending != backward)
            if len(found) >= limit:
                break
        return found

    def count(self, session: Session) -> int:
        """How many are selected."""
        harvest = self.door.sae.harvest
        assert harvest is not None
        filters = self.query.model_dump(exclude_defaults=True, exclude={"sort", "after", "before", "limit"})
        conditions = self._conditions(self._columns(None))
        asked = {of for of, _ in conditions}
        counted = self._rows(sa.select(sa.func.count()), asked).where(*(condition for _, condition in conditions))
        if len(asked) > 1 or not asked <= set(INDEXED):
            counted = self._in_order(counted)
        people = (self.query.labelled, self.query.label, self.query.in_list)
        written = None if people == (None, None, None) else self.door.revision
        name = f"count {sorted(filters.items())} {written}"
        return kept(session, harvest, name, lambda: int(session.execute(counted).scalar_one()))

    # ---- parts: features with a value, and those without ----

    def parts(self, start: Place | None, backward: bool) -> Iterator[bool]:
        """The parts to walk through from `start` on: False for features that have a value, True for those without."""
        parts = [False, True] if self.key in MAY_MISS else [False]
        if backward:
            parts.reverse()
        yield from parts if start is None else parts[parts.index(start.value is None) :]

    def _part(self, session: Session, missing: bool, start: Place | None, limit: int, descending: bool) -> list[Place]:
        statements = self.statements(missing, start, limit, descending)
        found = [Place(*row) for row in session.execute(next(statements))]
        whole = next(statements, None)
        # A harvest that is not longer than the reach has been looked through.
        if whole is None or len(found) == limit or self.door.sae.d_sae <= REACH:
            return found
        return [Place(*row) for row in session.execute(whole)]

    def statements(
        self, missing: bool, start: Place | None, limit: int, descending: bool
    ) -> Iterator[sa.Select[tuple[Any, int]]]:
        """What is asked first, and what is asked where that gives too few."""
        name = NAMES.get(self.key, self.key)
        columns = self._columns(name)
        place = columns[name]
        within = [place.is_(None)] if missing else [place.is_not(None)] if self.key in MAY_MISS else []
        if start is not None:
            within.append(_beyond(place, columns["idx"], start, descending))
        conditions = self._conditions(columns)
        aligned = [condition for of, condition in conditions if of == name]
        others = [condition for of, condition in conditions if of != name]
        way = sa.desc if descending else sa.asc
        asked = {name, *(of for of, _ in conditions)}
        if not others:
            found = self._rows(sa.select(place, columns["idx"]), asked, name).where(*within, *aligned)
            yield found.order_by(*_ordered(way, place, columns["idx"], missing)).limit(limit)
            return
        read = [column.label(called) for called, column in columns.items() if called in asked or called == "idx"]
        walked = self._rows(sa.select(*read), asked, name).where(*within, *aligned)
        near = walked.order_by(*_ordered(way, place, columns["idx"], missing)).limit(REACH).subquery()
        fits = [condition for of, condition in self._conditions(dict(near.c.items())) if of != name]
        seen = near.c[name]
        yield sa.select(seen, near.c.idx).where(*fits).order_by(*_ordered(way, seen, near.c.idx, missing)).limit(limit)
        whole = self._in_order(self._rows(sa.select(place, columns["idx"]), asked)).where(*within, *aligned, *others)
        yield whole.order_by(*_ordered(way, place, columns["idx"], missing)).limit(limit)

    # ---- what is read ----

    def _columns(self, by: str | None) -> dict[str, Any]:
        """The columns that may be asked of, with `by`, whose index is followed: the index is of that column's own table."""
        head = self.query.head is not None
        columns = {name: getattr(Feature, name) for name in ("n_fired", "density", "max_act", "top_head", "family")}
        columns["idx"] = FeatureHead.idx if head and (by is None or by in OF_HEAD) else Feature.idx
        columns["top_head_dfa"] = Feature.top_head_dfa
        columns["norm_share"] = FeatureHead.norm_share if head else Feature.top_head_share
        columns["dfa_share"] = FeatureHead.dfa_share if head else Feature.top_head_dfa_share
        return columns if by is None or by in columns else {**columns, by: getattr(Feature, by)}

    def _rows(self, statement: sa.Select[Any], asked: Set[str], by: str | None = None) -> sa.Select[Any]:
        """`statement` over the harvest's features, at the head that is chosen; `asked` are the columns that it needs, `by` is
        the one whose index it follows."""
        if self.query.head is None:
            return statement.select_from(Feature).where(Feature.harvest_id == self.harvest_id)
        at_head = (FeatureHead.harvest_id == self.harvest_id, FeatureHead.head == self.query.head)
        if asked <= {*OF_HEAD, "label"}:
            return statement.select_from(FeatureHead).where(*at_head)
        same = sa.and_(FeatureHead.harvest_id == Feature.harvest_id, FeatureHead.idx == Feature.idx)
        first, second = (FeatureHead, Feature) if by in OF_HEAD else (Feature, FeatureHead)
        both = InOrder(first.__table__, second.__table__, same)
        return statement.select_from(both).where(Feature.harvest_id == self.harvest_id, *at_head)

    def _in_order(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        return statement.with_hint(Feature, IN_ORDER, "sqlite")

    def _conditions(self, columns: Mapping[str, Any]) -> list[tuple[str, sa.ColumnElement[bool]]]:
        """What the filter asks, with the name of the column that it asks of."""
        query, found = self.query, []
        bounds = {
            "density": (query.min_density, query.max_density),
            "max_act": (query.min_max, query.max_max),
            "norm_share": (query.min_share, None),
            "dfa_share": (query.min_dfa_share, None),
        }
        for name, (least, most) in bounds.items():
            found += [(name, columns[name] >= least)] if least is not None else []
            found += [(name, columns[name] <= most)] if most is not None else []
        if query.leads:
            found.append(("top_head", columns["top_head"] == query.head))
        if query.leads_dfa:
            found.append(("top_head_dfa", columns["top_head_dfa"] == query.head))
        if query.family is not None:
            family = columns["family"]
            found.append(("family", family.is_(None) if query.family == "unclear" else family == query.family))
        if query.dead is not None:
            found.append(("n_fired", columns["n_fired"] == 0 if query.dead else columns["n_fired"] > 0))
        if query.labelled is not None:
            there = labelled(self.harvest_id, columns["idx"])
            found.append(("label", there if query.labelled else ~there))
        if query.in_list is not None:
            found.append(("label", listed(self.harvest_id, columns["idx"], query.in_list)))
        if query.label is not None:
            found.append(("label", labelled(self.harvest_id, columns["idx"], query.label)))
        return found


def _ordered(way: Any, place: Any, idx: Any, missing: bool) -> tuple[Any, ...]:
    return (way(idx),) if missing or place is idx else (way(place), way(idx))


def _beyond(place: Any, idx: Any, start: Place, descending: bool) -> sa.ColumnElement[bool]:
    if start.value is None or place is idx:
        here: Any = idx
        mark: Any = start.idx
    else:
        # Compared as a pair, which both databases look up in the index of the two.
        here, mark = sa.tuple_(place, idx), sa.tuple_(sa.literal(start.value), sa.literal(start.idx))
    return sa.and_(here < mark) if descending else sa.and_(here > mark)
