"""Transcoders of models' MLPs: at most one of each layer of a model."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound, UsageError
from server.store.accounts import record
from server.tables import Model, Transcoder

HOME = "transcoders"
"""Folder of their files in the data folder."""


@dataclass(frozen=True)
class TranscoderRecord:
    """A transcoder: whose MLP it is of, and where it is."""

    model: str
    layer: int
    n_features: int
    config: dict[str, Any]
    """`sae_core.transcoders.TranscoderConfig`, with the `fvu` and `l0` that it was found to have on a short text."""
    file: str
    """From the data folder."""
    sha256: str


def of_model(session: Session, model: str) -> list[TranscoderRecord]:
    """Those of a model, by layer."""
    return _records(session, Model.name == model)


def every(session: Session) -> list[TranscoderRecord]:
    """All, by model and layer."""
    return _records(session, sa.true())


def check_free(session: Session, model: str, layer: int | None, *, replace: bool) -> None:
    """UsageError where the layer has one that is not to be replaced."""
    if not replace and any(one.layer == layer for one in of_model(session, model)):
        raise UsageError(
            f"Layer {layer} of {model} has a transcoder already; --replace puts this one in its place.", field="replace"
        )


def put(session: Session, new: TranscoderRecord, *, replace: bool) -> str | None:
    """Register it; the file of the one that it replaces."""
    check_free(session, new.model, new.layer, replace=replace)
    model_id = session.scalars(sa.select(Model.id).where(Model.name == new.model)).one()
    there = sa.select(Transcoder).where(Transcoder.model_id == model_id, Transcoder.layer == new.layer).with_for_update()
    row = session.scalar(there) or Transcoder(model_id=model_id, layer=new.layer)
    before: str | None = row.file
    row.n_features, row.config, row.file, row.sha256 = new.n_features, new.config, new.file, new.sha256
    session.add(row)
    record(session, "import transcoder", new.model, layer=new.layer)
    return before


def delete(session: Session, model: str, layer: int) -> str:
    """Forget it; its file, which is still there. NotFound where there is none."""
    row = session.scalar(sa.select(Transcoder).join(Model).where(Model.name == model, Transcoder.layer == layer))
    if row is None:
        raise NotFound(f"{model} has no transcoder of layer {layer}; `headscope transcoders list` shows all.", field="layer")
    session.delete(row)
    record(session, "transcoders delete", model, layer=layer)
    return row.file


def _records(session: Session, which: sa.ColumnElement[bool]) -> list[TranscoderRecord]:
    found = sa.select(Model.name, Transcoder).join(Model).where(which).order_by(Model.name, Transcoder.layer)
    return [
        TranscoderRecord(name, row.layer, row.n_features, dict(row.config), row.file, row.sha256)
        for name, row in session.execute(found)
    ]
