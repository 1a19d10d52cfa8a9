"""Models, corpora and SAEs by name: how they are registered and found again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.config import CorpusSource, ModelSource, SAEConfig
from sae_core.errors import NotFound, SAEMismatch, UnknownCorpus, UnknownModel
from server.store.saes import current_name
from server.store.viewers import everything
from server.tables import SAE, Corpus, Feature, FormerName, Job, Model


@dataclass(frozen=True)
class ModelRecord:
    """A registered model; shapes are None until a worker has loaded it."""

    id: int
    name: str
    source: ModelSource
    fingerprint: str | None
    n_layers: int | None
    n_heads: int | None
    n_kv_heads: int | None
    d_head: int | None
    d_model: int | None
    d_vocab: int | None


@dataclass(frozen=True)
class CorpusRecord:
    """A registered corpus."""

    id: int
    name: str
    source: CorpusSource
    licences: list[dict[str, str]]


@dataclass(frozen=True)
class SAERecord:
    """A trained SAE: where it is and what it reads."""

    id: int
    name: str
    model_id: int
    config: SAEConfig
    folder: str
    sha256: str
    job_id: str | None


class ModelInfo(Protocol):
    """What is known of a model once it is loaded (`sae_core.lens.LensInfo`)."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def d_head(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def d_vocab(self) -> int: ...


SHAPES = ("fingerprint", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_model", "d_vocab")


# ---- models ----


def add_model(session: Session, name: str, source: ModelSource) -> ModelRecord:
    """Register a model, or find it; a name that stands for other weights is refused."""
    row = session.scalar(sa.select(Model).where(Model.name == name))
    if row is None:
        row = Model(name=name, source=source.model_dump(mode="json"))
        session.add(row)
        session.flush()
    elif ModelSource.model_validate(row.source) != source:
        raise UnknownModel(
            f"The name {name} is taken by the model at {row.source['location']}; register this one under another name.",
            field="model",
        )
    return _model(row)


def model(session: Session, name: str) -> ModelRecord:
    """The model registered as `name`."""
    row = session.scalar(sa.select(Model).where(Model.name == name))
    if row is None:
        known = ", ".join(session.scalars(sa.select(Model.name).order_by(Model.name))) or "none"
        raise UnknownModel(
            f"No model is registered as {name}; registered: {known}. Register one with `headscope model add`.", field="model"
        )
    return _model(row)


def model_at(session: Session, source: ModelSource) -> ModelRecord | None:
    """The model registered for exactly this source, if any."""
    rows = session.scalars(sa.select(Model).order_by(Model.id))
    return next((_model(row) for row in rows if ModelSource.model_validate(row.source) == source), None)


def model_by_id(session: Session, model_id: int) -> ModelRecord:
    """The model of that id."""
    return _model(session.get_one(Model, model_id))


def models(session: Session) -> list[ModelRecord]:
    """Every registered model, by name."""
    return [_model(row) for row in session.scalars(sa.select(Model).order_by(Model.name))]


def note_shape(session: Session, name: str, info: ModelInfo) -> None:
    """Keep what loading the model has shown; refuse when its weights are not those that its SAEs were made with."""
    row = session.scalars(sa.select(Model).where(Model.name == name)).one()
    if row.fingerprint not in (None, info.fingerprint) and session.scalar(sa.select(sa.exists().where(SAE.model_id == row.id))):
        raise SAEMismatch(
            f"The weights of {name} at {row.source['location']} have changed since its SAEs were trained; "
            "put the old weights back, or register the new ones under another name.",
            field="model",
        )
    for shape in SHAPES:
        setattr(row, shape, getattr(info, shape))


# ---- corpora ----


def add_corpus(session: Session, name: str, source: CorpusSource, licences: list[dict[str, str]] | None = None) -> CorpusRecord:
    """Register a corpus, or find it; a name that stands for other text is refused."""
    row = session.scalar(sa.select(Corpus).where(Corpus.name == name))
    if row is None:
        row = Corpus(name=name, source=source.model_dump(mode="json"), licences=licences or [])
        session.add(row)
        session.flush()
    elif CorpusSource.model_validate(row.source) != source:
        raise UnknownCorpus(
            f"The name {name} is taken by the corpus at {row.source['location']}; register this one under another name.",
            field="corpus",
        )
    elif licences:
        row.licences = list(licences)
    return _corpus(row)


def corpus(session: Session, name: str) -> CorpusRecord:
    """The corpus registered as `name`."""
    row = session.scalar(sa.select(Corpus).where(Corpus.name == name))
    if row is None:
        known = ", ".join(session.scalars(sa.select(Corpus.name).order_by(Corpus.name))) or "none"
        raise UnknownCorpus(
            f"No corpus is registered as {name}; registered: {known}. Register one with `headscope corpus add`.",
            field="corpus",
        )
    return _corpus(row)


def corpus_at(session: Session, source: CorpusSource) -> CorpusRecord | None:
    """The corpus registered for exactly this source, if any."""
    rows = session.scalars(sa.select(Corpus).order_by(Corpus.id))
    return next((_corpus(row) for row in rows if CorpusSource.model_validate(row.source) == source), None)


def corpora(session: Session) -> list[CorpusRecord]:
    """Every registered corpus, by name."""
    return [_corpus(row) for row in session.scalars(sa.select(Corpus).order_by(Corpus.name))]


def foreign_corpus(session: Session, name: str | None, dataset: str) -> CorpusRecord:
    """The corpus that imported dashboards are of, registered if it is not: `name`, else by what the files call it."""
    source = CorpusSource(location=f"hf:{dataset}" if dataset else "unknown")
    if name is not None:
        known = session.scalar(sa.select(Corpus).where(Corpus.name == name))
        return _corpus(known) if known is not None else add_corpus(session, name, source)
    base = dataset.rstrip("/").rsplit("/", 1)[-1] or "unknown text"
    taken = set(session.scalars(sa.select(Corpus.name)))
    free = next(other for n in range(1, 10**6) if (other := base if n == 1 else f"{base}-{n}") not in taken)
    return corpus_at(session, source) or add_corpus(session, free, source)


# ---- SAEs ----


def upsert_sae(
    session: Session,
    *,
    job_id: str,
    name: str,
    model_id: int,
    config: SAEConfig,
    metrics: dict[str, Any],
    folder: str,
    sha256: str,
    run: int = 0,
) -> int:
    """The SAE row that the job's training run `run` made, inserted once however often the job says it; returns its id."""
    row = session.scalar(sa.select(SAE).where(SAE.job_id == job_id, SAE.run == run))
    if row is None:
        row = SAE(job_id=job_id, run=run, name=name)  # people may have given it another name since
        job = session.get(Job, job_id)
        if job is not None:  # whose the job is, theirs is what it makes
            row.owner_id, row.visibility = job.owner_id, job.visibility
        session.add(row)
    row.model_id, row.folder, row.sha256, row.metrics = model_id, folder, sha256, metrics
    row.layer, row.hook, row.arch, row.k = config.site.layer, config.site.hook, config.arch, config.k
    row.d_in, row.d_sae, row.n_heads = config.d_in, config.d_sae, config.n_heads
    row.config = config.model_dump(mode="json")
    session.flush()
    return row.id


def sae(session: Session, name: str) -> SAERecord:
    """The SAE of that name, or that had it once."""
    return _sae(_named(session, name))


def _named(session: Session, name: str) -> SAE:
    row = session.scalar(sa.select(SAE).where(SAE.name == name))
    if row is None and (now_called := current_name(session, name)):
        return _named(session, now_called)
    if row is None:
        raise NotFound(f"There is no SAE {name}; `headscope train` makes one.", field="sae")
    return row


def saes_of_model(session: Session, model_id: int) -> list[SAERecord]:
    """All SAEs of a model, by layer."""
    return [_sae(row) for row in session.scalars(sa.select(SAE).where(SAE.model_id == model_id).order_by(SAE.layer, SAE.name))]


def metrics(session: Session, name: str) -> dict[str, Any]:
    """What evaluation has found of the SAE."""
    return dict(_named(session, name).metrics)


def note_metrics(session: Session, name: str, found: dict[str, Any]) -> None:
    """Put what an evaluation found in the place of what was known. Probes and matches that it did not make again stay: the
    SAE is the same."""
    row = session.get_one(SAE, _named(session, name).id, with_for_update=True, populate_existing=True)
    kept = {}
    for part, key in (("probes", "name"), ("stability", "against")):
        made = found.get(part) or []
        again = {one[key] for one in made}
        kept[part] = [one for one in row.metrics.get(part) or [] if one[key] not in again] + made
    row.metrics = found | kept


def harvests_of(session: Session, sae_ids: Sequence[int]) -> list[int]:
    """Ids of the published harvests of these SAEs."""
    found = session.scalars(sa.select(SAE.harvest_id).where(SAE.id.in_(sae_ids), SAE.harvest_id.is_not(None)))
    return [harvest_id for harvest_id in found if harvest_id is not None]


def live_features(session: Session, name: str) -> list[int] | None:
    """Indices of the features that fired in the published harvest; None without one."""
    harvest_id = session.scalar(sa.select(SAE.harvest_id).where(SAE.name == name))
    if harvest_id is None:
        return None
    fired = sa.select(Feature.idx).where(Feature.harvest_id == harvest_id, Feature.n_fired > 0)
    return list(session.scalars(fired.order_by(Feature.idx)))


def sae_names(session: Session) -> set[str]:
    """Names that are taken, by what the viewer does not see too, and former ones: they still lead to an SAE."""
    return {name for names in (SAE.name, FormerName.name) for name in session.scalars(everything(sa.select(names)))}


def sae_folders(session: Session) -> set[str]:
    """Where the weights of SAEs are, from the data folder."""
    return set(session.scalars(everything(sa.select(SAE.folder))))


def seen_names(session: Session) -> list[str]:
    """Names that can be chosen, in order."""
    return list(session.scalars(sa.select(SAE.name).order_by(SAE.name)))


def _sae(row: SAE) -> SAERecord:
    return SAERecord(row.id, row.name, row.model_id, SAEConfig.model_validate(row.config), row.folder, row.sha256, row.job_id)


def _model(row: Model) -> ModelRecord:
    shapes = {name: getattr(row, name) for name in SHAPES}
    return ModelRecord(row.id, row.name, ModelSource.model_validate(row.source), **shapes)


def _corpus(row: Corpus) -> CorpusRecord:
    return CorpusRecord(row.id, row.name, CorpusSource.model_validate(row.source), list(row.licences))
