"""SAEs by the ids that Neuronpedia's scripts use: a model, and a source `{layer}-{set}` of it.

An SAE's own id is its layer and its name, so the SAE `smollm2-l17` of layer 17 is `17-smollm2-l17`. That never changes
with what other SAEs there are. An id is also understood where the set is a former name of the SAE, its name without the
mark of the layer (`17-smollm2`), or where the whole id is the name (`9-att-kk`). What would mean two SAEs means none.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound
from server.store.saes import Door, sae_by_id
from server.tables import SAE, FormerName, Model

_ID = re.compile(r"(\d{1,6})-(.+)", re.ASCII)
SHOWN = 6
"""Ids that a refusal names."""


@dataclass(frozen=True)
class SourceModel:
    """A model, as far as its row says."""

    name: str
    n_layers: int | None
    d_model: int | None
    created_at: datetime


@dataclass(frozen=True)
class SourceRef:
    """An SAE by the ids that it was asked for."""

    model_id: str
    id: str
    set: str
    name: str
    """The SAE's own name."""
    sae_id: int
    model: SourceModel


@dataclass(frozen=True)
class Source:
    """A `SourceRef` with the SAE's door open."""

    ref: SourceRef
    door: Door


def source_id(layer: int, name: str) -> str:
    """The id of an SAE."""
    return f"{layer}-{name}"


def without_layer(name: str, layer: int) -> str | None:
    """`name` without the part that says its layer, `l17` or `layer17`; None where no part does, or nothing else is left."""
    mark = re.search(rf"(?i)(?:^|[-_.])l(?:ayer)?[-_.]?0*{layer}(?=$|[-_.])", name)
    if mark is None:
        return None
    return (name[: mark.start()] + name[mark.end() :]).strip("-_.") or None


def find_source(session: Session, model_id: str, source: str) -> Source:
    """The SAE that is meant: two queries. NotFound, with a sentence, where there is none or more than one."""
    ref = find_ref(session, model_id, source)
    return Source(ref, sae_by_id(session, ref.sae_id))


def find_ref(session: Session, model_id: str, source: str) -> SourceRef:
    """The SAE that is meant, by its number: one query where it goes by its present name."""
    parsed = _ID.fullmatch(source)
    if parsed is None:
        raise NotFound(f"'{source}' is no source: sources are called {{layer}}-{{set}}, like 17-smollm2-l17.", field="layer")
    layer, set_name = int(parsed[1]), parsed[2]
    rows = _of_model(_saes(session, SAE.layer == layer), model_id)
    found = _meant(session, rows, set_name, source)
    if not found:
        raise _unknown(session, model_id, source)
    if len(found) > 1:
        named = " and ".join(sorted(f"{row.model.name}/{source_id(row.layer, row.name)}" for row in found))
        raise NotFound(f"'{model_id}/{source}' could be {named}; use one of these ids, or rename one of the SAEs.", field="layer")
    return SourceRef(model_id, source, set_name, found[0].name, found[0].sae_id, found[0].model)


def find_set(session: Session, model_id: str, name: str) -> tuple[SourceRef, ...]:
    """Every SAE whose id may end in `name`, by layer: at most one a layer. NotFound where there is none."""
    rows = _of_model(_saes(session), model_id)
    refs = []
    for layer in sorted({row.layer for row in rows}):
        found = _meant(session, [row for row in rows if row.layer == layer], name, f"{layer}-{name}")
        if len(found) == 1:
            refs.append(SourceRef(model_id, f"{layer}-{name}", name, found[0].name, found[0].sae_id, found[0].model))
    if not refs:
        raise NotFound(f"{model_id} has no source set '{name}'. {_there_are(rows)}", field="sourceSet")
    return tuple(refs)


def every_ref(session: Session, model_id: str | None = None) -> tuple[SourceRef, ...]:
    """Every SAE under its own id, of one model or of all. NotFound for a model that has none."""
    rows = _saes(session)
    if model_id is not None:
        rows = _of_model(rows, model_id)
        if not rows:
            raise NotFound(_no_model(session, model_id), field="modelId")
    own = ((row, model_id or row.model.name) for row in rows)
    return tuple(
        SourceRef(model, source_id(row.layer, row.name), row.name, row.name, row.sae_id, row.model) for row, model in own
    )


# ---- which SAE is meant ----


@dataclass(frozen=True)
class _Row:
    sae_id: int
    name: str
    layer: int
    model: SourceModel


def _saes(session: Session, *conditions: sa.ColumnElement[bool]) -> list[_Row]:
    rows = session.execute(
        sa.select(SAE.id, SAE.name, SAE.layer, Model.name, Model.n_layers, Model.d_model, Model.created_at)
        .join(Model, Model.id == SAE.model_id)
        .where(*conditions)
        .order_by(SAE.layer, SAE.name)
    )
    return [_Row(row[0], row[1], row[2], SourceModel(*row[3:])) for row in rows]


def _of_model(rows: Sequence[_Row], model_id: str) -> list[_Row]:
    """Those of the model of that name; else those of a model that differs in capitals only, or in who published it."""
    exactly = [row for row in rows if row.model.name == model_id]
    wanted = model_id.casefold()
    return exactly or [row for row in rows if wanted in (row.model.name.casefold(), row.model.name.casefold().split("/")[-1])]


def _meant(session: Session, rows: Sequence[_Row], set_name: str, source: str) -> list[_Row]:
    """Those of `rows`, all of one layer, that an id means: the first way of reading it that fits any."""
    if not rows:
        return []
    for fits in _readings(session, set_name, source):
        if found := [row for row in rows if fits(row)]:
            return found
    return []


def _readings(session: Session, set_name: str, source: str) -> Iterator[Any]:
    yield lambda row: row.name in (set_name, source)
    former = set(session.scalars(sa.select(FormerName.sae_id).where(FormerName.name.in_([set_name, source]))))
    yield lambda row: row.sae_id in former
    yield lambda row: without_layer(row.name, row.layer) == set_name


def _unknown(session: Session, model_id: str, source: str) -> NotFound:
    rows = _of_model(_saes(session), model_id)
    if not rows:
        return NotFound(_no_model(session, model_id), field="modelId")
    return NotFound(f"{model_id} has no source '{source}'. {_there_are(rows)}", field="layer")


def _there_are(rows: Sequence[_Row]) -> str:
    ids = [source_id(row.layer, row.name) for row in rows]
    more = f", and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return f"There are: {', '.join(ids[:SHOWN])}{more}." if ids else "There are none yet."


def _no_model(session: Session, model_id: str) -> str:
    names = session.scalars(sa.select(Model.name).order_by(Model.name).limit(SHOWN)).all()
    there_are = f"Models: {', '.join(names)}." if names else "There are no models yet."
    return f"There is no SAE of a model '{model_id}'. {there_are}"
