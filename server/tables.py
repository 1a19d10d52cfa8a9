"""The schema: one SQLAlchemy 2 description for SQLite and PostgreSQL. Only `store/` and `migrations/` read it.

Large tensors stay on disk; what is browsed is rows. Packed columns (`LargeBinary`) are little-endian, laid out as
`packing.py` says. A published harvest never changes; a later one replaces it by moving `sae.harvest_id`.
"""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from server.packing import deflate, inflate

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Dense(sa.types.TypeDecorator[Any]):
    """JSON of which there is much. SQLite, which does not compress by itself, holds it deflated: two fifths less, for ten
    microseconds a column. What an older Headscope wrote there as text is read as text. No SQL may look into it."""

    impl = sa.JSON
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """JSONB on PostgreSQL."""
        return dialect.type_descriptor(JSONB() if dialect.name == "postgresql" else sa.JSON())

    def bind_processor(self, dialect: sa.Dialect) -> Any:
        """Python to what the driver takes."""
        written = super().bind_processor(dialect)
        if dialect.name != "sqlite" or written is None:
            return written
        return lambda value: deflate(written(value))

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Any:
        """What the driver gives to Python."""
        read = super().result_processor(dialect, coltype)
        if dialect.name != "sqlite" or read is None:
            return read
        return lambda value: read(inflate(value) if isinstance(value, bytes) else value)


BigId = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Json = sa.JSON().with_variant(JSONB(), "postgresql")


class Utc(sa.TypeDecorator[datetime]):
    """A time in UTC. SQLite keeps no zone, so it is put back: whoever reads JSON must not take it for a time of their own."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Any:
        """What the driver gives to Python."""
        read = self.impl_instance.result_processor(dialect, coltype)

        def in_utc(value: Any) -> datetime | None:
            time: datetime | None = value if read is None else read(value)
            return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time

        return in_utc


Time = Utc()


def now() -> datetime:
    """The present, in UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    metadata = sa.MetaData(naming_convention=NAMES)
    type_annotation_map = {dict[str, Any]: Json, list[Any]: Json, datetime: Time}


class Model(Base):
    """A language model registered by name."""

    __tablename__ = "model"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(200), unique=True)
    source: Mapped[dict[str, Any]]  # ModelSource
    created_at: Mapped[datetime] = mapped_column(default=now)
    # known once a worker has loaded it
    fingerprint: Mapped[str | None] = mapped_column(sa.String(80))  # `gguf:` and a sha256, or the like
    n_layers: Mapped[int | None]
    n_heads: Mapped[int | None]
    n_kv_heads: Mapped[int | None]
    d_head: Mapped[int | None]
    d_model: Mapped[int | None]
    d_vocab: Mapped[int | None]


class Corpus(Base):
    """A body of text registered by name."""

    __tablename__ = "corpus"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(200), unique=True)
    source: Mapped[dict[str, Any]]  # CorpusSource
    licences: Mapped[list[Any]] = mapped_column(default=list)  # [{"part", "licence", "source"}]
    created_at: Mapped[datetime] = mapped_column(default=now)


class RemovedDocument(Base):
    """A document that rows of a corpus are cut without. Its text is gone, so it is known by its hash alone."""

    __tablename__ = "removed_document"
    corpus_id: Mapped[int] = mapped_column(sa.ForeignKey("corpus.id", ondelete="CASCADE"), primary_key=True)
    digest: Mapped[str] = mapped_column(sa.String(64), primary_key=True)  # SHA-256 of its text
    removed_at: Mapped[datetime] = mapped_column(default=now)


class SAE(Base):
    """A trained dictionary on one site. Its weights are a folder on disk."""

    __tablename__ = "sae"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(200), unique=True)
    model_id: Mapped[int] = mapped_column(sa.ForeignKey("model.id"))
    layer: Mapped[int]
    hook: Mapped[str] = mapped_column(sa.String(100))
    arch: Mapped[str] = mapped_column(sa.String(30))
    d_in: Mapped[int]
    d_sae: Mapped[int]
    k: Mapped[int]
    n_heads: Mapped[int]
    config: Mapped[dict[str, Any]]  # SAEConfig
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)  # sae_core.evaluate.Evaluation
    folder: Mapped[str] = mapped_column(sa.Text)  # relative to the data folder
    sha256: Mapped[str] = mapped_column(sa.String(64))
    job_id: Mapped[str | None] = mapped_column(sa.String(100))
    run: Mapped[int] = mapped_column(default=0)  # which of the job's training runs made it, from 0
    harvest_id: Mapped[int | None] = mapped_column(sa.ForeignKey("harvest.id", use_alter=True))  # the published one
    created_at: Mapped[datetime] = mapped_column(default=now)
    description: Mapped[str | None] = mapped_column(sa.Text)
    archived_at: Mapped[datetime | None]  # since when the first page leaves it out
    revision: Mapped[int] = mapped_column(default=0)  # raised by what people write about it and its features
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("account.id", ondelete="SET NULL"))
    visibility: Mapped[str] = mapped_column(sa.String(10), default="shared", server_default="shared")  # private, shared, public
    __table_args__ = (sa.UniqueConstraint("job_id", "run"),)


class FormerName(Base):
    """A name that an SAE had, which still leads to it."""

    __tablename__ = "former_name"
    name: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    sae_id: Mapped[int] = mapped_column(sa.ForeignKey("sae.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)  # when it was given up


class Harvest(Base):
    """One sweep of a corpus through a model and an SAE. Readers see it once `sae.harvest_id` points at it."""

    __tablename__ = "harvest"
    id: Mapped[int] = mapped_column(primary_key=True)
    sae_id: Mapped[int] = mapped_column(sa.ForeignKey("sae.id"), index=True)
    corpus_id: Mapped[int] = mapped_column(sa.ForeignKey("corpus.id"))
    job_id: Mapped[str] = mapped_column(sa.String(100))
    config: Mapped[dict[str, Any]]  # HarvestConfig
    # of a harvest that was not made here: {"format", "path", "dfa": "heads summed" or "none", "lacks": [words]}
    source: Mapped[dict[str, Any] | None]
    status: Mapped[str] = mapped_column(sa.String(20), default="running")  # running, published, replaced
    n_tokens: Mapped[int] = mapped_column(default=0)  # swept, excluded positions not counted
    n_rows: Mapped[int] = mapped_column(default=0)
    n_live: Mapped[int] = mapped_column(default=0)
    n_examples: Mapped[int] = mapped_column(default=0)
    context: Mapped[int] = mapped_column(default=0)
    worst_gap: Mapped[float | None]  # largest relative gap of the identity over all examples
    created_at: Mapped[datetime] = mapped_column(default=now)
    published_at: Mapped[datetime | None]
    name: Mapped[str | None] = mapped_column(sa.String(200))  # what people call it
    description: Mapped[str | None] = mapped_column(sa.Text)
    archived_at: Mapped[datetime | None]
    __table_args__ = (sa.UniqueConstraint("job_id", "sae_id"),)  # one job may harvest many SAEs in one pass


class HarvestPart(Base):
    """A part of a harvest that is written. Inserted in the same transaction as its rows, so that each part counts once."""

    __tablename__ = "harvest_part"
    harvest_id: Mapped[int] = mapped_column(sa.ForeignKey("harvest.id", ondelete="CASCADE"), primary_key=True)
    part: Mapped[str] = mapped_column(sa.String(60), primary_key=True)
    worst_gap: Mapped[float | None]  # of its examples: |sum of all DFA + bias - preact| / (sum of |DFA| + |bias|), in fp32


class Feature(Base):
    """One direction of an SAE, as one harvest saw it: narrow, to sort and filter."""

    __tablename__ = "feature"
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    harvest_id: Mapped[int] = mapped_column(sa.ForeignKey("harvest.id", ondelete="CASCADE"))
    idx: Mapped[int]
    n_fired: Mapped[int]
    density: Mapped[float]
    max_act: Mapped[float]
    mean_act: Mapped[float]  # over firings
    top_head: Mapped[int]  # by decoder norm
    top_head_share: Mapped[float]
    top_head_dfa: Mapped[int | None]  # by |mean DFA|; None when dead
    top_head_dfa_share: Mapped[float | None]
    distance: Mapped[float | None]  # mean dest - src, weighted by positive DFA, row start left out; a sample
    family: Mapped[str | None] = mapped_column(sa.String(30))
    family_score: Mapped[float | None]  # how clearly, 0 to 1
    shuffle_key: Mapped[int] = mapped_column(sa.Integer)
    __table_args__ = (
        sa.UniqueConstraint("harvest_id", "idx"),
        sa.Index(None, "harvest_id", "max_act", "idx"),
        sa.Index(None, "harvest_id", "density", "idx"),
        sa.Index(None, "harvest_id", "mean_act", "idx"),
        sa.Index(None, "harvest_id", "top_head_share", "idx"),
        sa.Index(None, "harvest_id", "top_head_dfa_share", "idx"),
        sa.Index(None, "harvest_id", "distance", "idx"),
        sa.Index(None, "harvest_id", "family", "idx"),
        sa.Index(None, "harvest_id", "shuffle_key", "idx"),
    )


class FeatureDetail(Base):
    """What only the feature's own page shows."""

    __tablename__ = "feature_detail"
    feature_id: Mapped[int] = mapped_column(BigId, sa.ForeignKey("feature.id", ondelete="CASCADE"), primary_key=True)
    histogram: Mapped[dict[str, Any]] = mapped_column(Dense)  # {"edges": [n+1 values, equal in log], "counts": [n]}
    bands: Mapped[list[Any]] = mapped_column(Dense)  # [{"low", "high", "count"}], strongest first
    head_norm: Mapped[bytes]  # f4[n_heads], shares of the decoder norm, sum 1
    head_dfa: Mapped[bytes]  # f4[n_heads], mean signed DFA over every firing
    head_dfa_std: Mapped[bytes]  # f4[n_heads], its spread over firings
    promoted: Mapped[list[Any]] = mapped_column(Dense)  # [[token id, token text, value]], strongest first
    suppressed: Mapped[list[Any]] = mapped_column(Dense)  # the same, most negative first
    neighbours: Mapped[list[Any]] = mapped_column(Dense)  # [[idx, cosine]], nearest first
    evidence: Mapped[dict[str, Any]] = mapped_column(Dense)  # numbers behind the family
    # [{"family", "score", "examples": [[band, rank]]}], clearest first
    families: Mapped[list[Any]] = mapped_column(Dense, default=list)
    verdict: Mapped[str | None] = mapped_column(sa.Text)  # in words: "' board' is next by induction"
    logits: Mapped[dict[str, Any]] = mapped_column(Dense, default=dict)  # {"edges", "counts"}: logit weights over the vocabulary
    # [[low, high, firings, tokens, mean activation]] by position
    positions: Mapped[list[Any]] = mapped_column(Dense, default=list)
    coactive: Mapped[dict[str, Any]] = mapped_column(Dense, default=dict)  # {"tokens", "pairs": [[idx, both, correlation]]}
    # of the kept examples: {"n", "distance", "entropies", ...}
    sample: Mapped[dict[str, Any]] = mapped_column(Dense, default=dict)


class FeatureHead(Base):
    """A feature's share at one head, to browse and sort features by head."""

    __tablename__ = "feature_head"
    harvest_id: Mapped[int] = mapped_column(sa.ForeignKey("harvest.id", ondelete="CASCADE"), primary_key=True)
    head: Mapped[int] = mapped_column(primary_key=True)
    idx: Mapped[int] = mapped_column(primary_key=True)
    norm_share: Mapped[float]
    dfa: Mapped[float | None]  # mean signed DFA
    dfa_share: Mapped[float | None]  # |mean| / sum of |means|
    __table_args__ = (
        sa.Index(None, "harvest_id", "head", "norm_share", "idx"),
        sa.Index(None, "harvest_id", "head", "dfa_share", "idx"),
        {"sqlite_with_rowid": False},  # its key is most of a row
    )


class Token(Base):
    """A token's text, once for all harvests, to search by."""

    __tablename__ = "token"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.Text, unique=True)  # as shown
    word: Mapped[str] = mapped_column(sa.Text, index=True)  # as it is looked for: no spaces around it, small letters


class FeatureToken(Base):
    """What a token has to do with a feature: it fires on it, promotes it or suppresses it."""

    __tablename__ = "feature_token"
    harvest_id: Mapped[int] = mapped_column(sa.ForeignKey("harvest.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[int] = mapped_column(primary_key=True)  # search.FIRES, PROMOTES, SUPPRESSES
    token_id: Mapped[int] = mapped_column(sa.ForeignKey("token.id"), primary_key=True)
    weight: Mapped[float] = mapped_column(primary_key=True)  # strongest activation on it, or |logit weight|
    idx: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]  # kept examples whose destination it is; for logits the rank, from 0
    # The key is the order in which it is read, so on SQLite the table is its own index.
    __table_args__ = ({"sqlite_with_rowid": False},)


class HeadSummary(Base):
    """What a harvest's features say of one head of the site."""

    __tablename__ = "head_summary"
    harvest_id: Mapped[int] = mapped_column(sa.ForeignKey("harvest.id", ondelete="CASCADE"), primary_key=True)
    head: Mapped[int] = mapped_column(primary_key=True)
    n_led: Mapped[int]  # live features of which it has the largest |mean DFA|
    n_led_norm: Mapped[int]  # live features of which it has the largest decoder norm
    families: Mapped[dict[str, Any]]  # {family: how many of those it leads}
    diversity: Mapped[float | None]  # directions that it writes, effectively; before, of its top features, 0 to 1
    polysemantic: Mapped[float | None]  # estimate, 0 to 1
    detail: Mapped[dict[str, Any]]  # its top features and the numbers behind the two


class Study(Base):
    """What a study found: a question put to a feature, or to the heads of a model."""

    __tablename__ = "study"
    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(sa.String(100), unique=True)
    kind: Mapped[str] = mapped_column(sa.String(30))  # specificity, induction
    title: Mapped[str] = mapped_column(sa.String(300))
    model_id: Mapped[int] = mapped_column(sa.ForeignKey("model.id"))
    sae_id: Mapped[int | None] = mapped_column(sa.ForeignKey("sae.id"))
    feature: Mapped[int | None]  # its index
    config: Mapped[dict[str, Any]]  # StudyJob
    result: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)
    __table_args__ = (sa.Index(None, "sae_id", "feature"),)


class Context(Base):
    """The text of a row, stored once for all its examples."""

    __tablename__ = "context"
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    harvest_id: Mapped[int] = mapped_column(sa.ForeignKey("harvest.id", ondelete="CASCADE"))
    row: Mapped[int]  # index in the rows on disk
    tokens: Mapped[bytes]  # i4[context], token ids; empty in an imported harvest, which has texts alone
    texts: Mapped[list[Any]]  # token strings as shown; the web needs no tokenizer
    __table_args__ = (sa.UniqueConstraint("harvest_id", "row"),)


class Example(Base):
    """A row where a feature fired, at one destination."""

    __tablename__ = "example"
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    feature_id: Mapped[int] = mapped_column(BigId, sa.ForeignKey("feature.id", ondelete="CASCADE"))
    context_id: Mapped[int] = mapped_column(BigId, sa.ForeignKey("context.id", ondelete="CASCADE"), index=True)
    band: Mapped[int]  # 0 = the strongest examples; 1.. = samples of the value bands, strongest band first
    rank: Mapped[int]  # from 0 within the band, strongest first
    dest: Mapped[int]  # destination, position in the row
    start: Mapped[int]  # first position of the shown window
    act: Mapped[float]  # fp32 visit
    acts: Mapped[bytes]  # packing.pack_acts: the feature's nonzero activations in the window
    dfa: Mapped[
        bytes
    ]  # packing.pack_dfa: kept (source, head, value), per head what is beside them, pre-activation, bias; or empty
    __table_args__ = (sa.UniqueConstraint("feature_id", "band", "rank"),)


class Job(Base):
    """Work that a worker does. DBOS holds the queue and the steps; this row is what people see and what fences writes."""

    __tablename__ = "job"
    id: Mapped[str] = mapped_column(sa.String(100), primary_key=True)  # also the DBOS workflow id
    kind: Mapped[str] = mapped_column(sa.String(20))  # train, sweep, evaluate, harvest, study, compare, import
    title: Mapped[str] = mapped_column(sa.String(300))
    config: Mapped[dict[str, Any]]  # TrainConfig, SweepConfig or HarvestJob
    parent_id: Mapped[str | None] = mapped_column(sa.ForeignKey("job.id"))
    status: Mapped[str] = mapped_column(sa.String(20), default="queued", index=True)  # queued, running, done, failed, cancelled
    attempt: Mapped[int] = mapped_column(default=0)  # raised when a worker takes the job up; a write checks it
    worker: Mapped[str | None] = mapped_column(sa.String(60))
    phase: Mapped[str | None] = mapped_column(sa.String(30))
    done: Mapped[int] = mapped_column(BigId, default=0)
    total: Mapped[int] = mapped_column(BigId, default=0)
    unit: Mapped[str] = mapped_column(sa.String(20), default="tokens")
    rate: Mapped[float] = mapped_column(default=0.0)
    seconds_left: Mapped[float | None]  # of the whole job, as estimated now
    error: Mapped[str | None] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)
    started_at: Mapped[datetime | None]
    updated_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("account.id", ondelete="SET NULL"))
    visibility: Mapped[str] = mapped_column(sa.String(10), default="shared", server_default="shared")  # private, shared, public
    priority: Mapped[int] = mapped_column(default=5, server_default="5")  # 1 starts first, 9 last
    only_on: Mapped[str | None] = mapped_column(sa.String(10))  # cpu, cuda, mps: the only kind that may do it; null for any
    time_limit: Mapped[float | None]  # seconds that it may work, all attempts together
    worked: Mapped[float] = mapped_column(default=0.0, server_default="0")  # seconds that it has worked
    tries: Mapped[int] = mapped_column(default=0, server_default="0")  # times that it was queued again by itself
    not_before: Mapped[datetime | None]  # it waits until then


class JobSae(Base):
    """An SAE that a job reads: who may not see the SAE sees nothing of the job. Those that it makes name the job themselves."""

    __tablename__ = "job_sae"
    job_id: Mapped[str] = mapped_column(sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    sae_id: Mapped[int] = mapped_column(sa.ForeignKey("sae.id", ondelete="CASCADE"), primary_key=True, index=True)


class JobPoint(Base):
    """A point of a job's curves."""

    __tablename__ = "job_point"
    job_id: Mapped[str] = mapped_column(sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    run: Mapped[int] = mapped_column(primary_key=True, default=0)  # of a sweep's runs, from 0
    step: Mapped[int] = mapped_column(primary_key=True)
    values: Mapped[dict[str, Any]]  # loss, fvu, l0, dead, rate


class JobLog(Base):
    """A line that a job said."""

    __tablename__ = "job_log"
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    job_id: Mapped[str] = mapped_column(sa.ForeignKey("job.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime] = mapped_column(default=now)
    text: Mapped[str] = mapped_column(sa.Text)


class Worker(Base):
    """A worker's slot and its heartbeat."""

    __tablename__ = "worker"
    id: Mapped[str] = mapped_column(sa.String(60), primary_key=True)
    device: Mapped[str] = mapped_column(sa.String(100))
    pid: Mapped[int]
    last_seen: Mapped[datetime]
    beats: Mapped[int] = mapped_column(default=0, server_default="0")  # rises with every heartbeat, whatever the clocks say


# What people write belongs to (sae, index), not to a harvest, and outlives it. Who wrote is a name: without accounts, any name.


class Label(Base):
    """A name for a feature. Never overwritten: an edit ends it and another follows."""

    __tablename__ = "label"
    id: Mapped[int] = mapped_column(primary_key=True)
    sae_id: Mapped[int] = mapped_column(sa.ForeignKey("sae.id", ondelete="CASCADE"))
    idx: Mapped[int]
    text: Mapped[str] = mapped_column(sa.String(200))
    author: Mapped[str] = mapped_column(sa.String(60))
    method: Mapped[str] = mapped_column(sa.String(60))  # "person", or what made it
    created_at: Mapped[datetime] = mapped_column(default=now)
    ended_at: Mapped[datetime | None]  # since when it holds no more
    ended_by: Mapped[str | None] = mapped_column(sa.String(60))
    follows_id: Mapped[int | None] = mapped_column(sa.ForeignKey("label.id"), index=True)  # the one that it superseded
    __table_args__ = (sa.Index(None, "sae_id", "idx"),)


class Note(Base):
    """A longer text about a feature."""

    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    sae_id: Mapped[int] = mapped_column(sa.ForeignKey("sae.id", ondelete="CASCADE"))
    idx: Mapped[int]
    text: Mapped[str] = mapped_column(sa.Text)
    author: Mapped[str] = mapped_column(sa.String(60))
    created_at: Mapped[datetime] = mapped_column(default=now)
    deleted_at: Mapped[datetime | None]
    deleted_by: Mapped[str | None] = mapped_column(sa.String(60))
    __table_args__ = (sa.Index(None, "sae_id", "idx"),)


class Star(Base):
    """A feature that somebody wants to find again."""

    __tablename__ = "star"
    sae_id: Mapped[int] = mapped_column(sa.ForeignKey("sae.id", ondelete="CASCADE"), primary_key=True)
    idx: Mapped[int] = mapped_column(primary_key=True)
    author: Mapped[str] = mapped_column(sa.String(60), primary_key=True, index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


class FeatureList(Base):
    """Features that somebody put together, of one SAE or of several."""

    __tablename__ = "feature_list"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(120))
    description: Mapped[str] = mapped_column(sa.Text)
    author: Mapped[str] = mapped_column(sa.String(60))
    created_at: Mapped[datetime] = mapped_column(default=now)
    changed_at: Mapped[datetime] = mapped_column(default=now)
    deleted_at: Mapped[datetime | None]
    deleted_by: Mapped[str | None] = mapped_column(sa.String(60))
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("account.id", ondelete="SET NULL"))
    visibility: Mapped[str] = mapped_column(sa.String(10), default="shared", server_default="shared")  # private, shared, public


class ListEntry(Base):
    """A feature in a list."""

    __tablename__ = "list_entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    list_id: Mapped[int] = mapped_column(sa.ForeignKey("feature_list.id", ondelete="CASCADE"))
    sae_id: Mapped[int] = mapped_column(sa.ForeignKey("sae.id", ondelete="CASCADE"))
    idx: Mapped[int]
    place: Mapped[int]  # order in the list
    note: Mapped[str] = mapped_column(sa.Text)
    author: Mapped[str] = mapped_column(sa.String(60))
    created_at: Mapped[datetime] = mapped_column(default=now)
    removed_at: Mapped[datetime | None]
    removed_by: Mapped[str | None] = mapped_column(sa.String(60))
    __table_args__ = (sa.UniqueConstraint("list_id", "sae_id", "idx"), sa.Index(None, "sae_id", "idx"))


class Review(Base):
    """A blind review: features drawn from an SAE's live ones, to be rated by one or more people."""

    __tablename__ = "review"
    id: Mapped[int] = mapped_column(primary_key=True)
    sae_id: Mapped[int] = mapped_column(sa.ForeignKey("sae.id", ondelete="CASCADE"), index=True)
    harvest_id: Mapped[int]  # the one whose live features were drawn from; it may be gone by now
    n_live: Mapped[int]  # so many were drawn from
    seed: Mapped[int] = mapped_column(BigId)
    author: Mapped[str] = mapped_column(sa.String(60))
    created_at: Mapped[datetime] = mapped_column(default=now)


class ReviewFeature(Base):
    """A feature that was drawn."""

    __tablename__ = "review_feature"
    review_id: Mapped[int] = mapped_column(sa.ForeignKey("review.id", ondelete="CASCADE"), primary_key=True)
    idx: Mapped[int] = mapped_column(primary_key=True)


class Rating(Base):
    """What one person judged of one feature of a review."""

    __tablename__ = "rating"
    review_id: Mapped[int] = mapped_column(sa.ForeignKey("review.id", ondelete="CASCADE"), primary_key=True)
    idx: Mapped[int] = mapped_column(primary_key=True)
    author: Mapped[str] = mapped_column(sa.String(60), primary_key=True)
    answer: Mapped[str] = mapped_column(sa.String(10))  # yes, maybe, no
    label: Mapped[str] = mapped_column(sa.String(200))
    note: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Transcoder(Base):
    """A transcoder of one MLP of a model, for circuits. Its weights are a file on disk."""

    __tablename__ = "transcoder"
    __table_args__ = (sa.UniqueConstraint("model_id", "layer"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    model_id: Mapped[int] = mapped_column(sa.ForeignKey("model.id"))
    layer: Mapped[int]
    n_features: Mapped[int]
    config: Mapped[dict[str, Any]]  # sae_core.transcoders.TranscoderConfig, and what it was found to leave: `fvu`, `l0`
    file: Mapped[str] = mapped_column(sa.Text)  # relative to the data folder
    sha256: Mapped[str] = mapped_column(sa.String(64))
    created_at: Mapped[datetime] = mapped_column(default=now)


# Who may come in. Of what lets somebody in, only a hash is kept.


class Prompt(Base):
    """A text that somebody shared, with the view of it. Whoever has its id and may see it can open it."""

    __tablename__ = "prompt"
    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)  # random, so that it cannot be guessed
    text: Mapped[str] = mapped_column(sa.Text)
    against: Mapped[str | None] = mapped_column(sa.Text)  # the text that it is compared with
    view: Mapped[dict[str, Any]]  # {"model": id, "saes": [ids], "at", "feature"}: ids, so that no name is told by it
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None] = mapped_column(index=True)
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("account.id", ondelete="SET NULL"))
    visibility: Mapped[str] = mapped_column(sa.String(10), default="shared", server_default="shared")  # private, shared, public


class Account(Base):
    """A person who may log in."""

    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(60), unique=True)  # what they write is signed with
    folded: Mapped[str] = mapped_column(sa.String(120), unique=True)  # the name without capitals, so that no two look alike
    role: Mapped[str] = mapped_column(sa.String(10))  # reader, editor, admin
    password: Mapped[str | None] = mapped_column(sa.Text)  # argon2id; None where another service says who it is
    subject: Mapped[str | None] = mapped_column(sa.String(300), unique=True)  # who it is there: issuer and subject
    created_at: Mapped[datetime] = mapped_column(default=now)
    disabled_at: Mapped[datetime | None]  # since when they may not come in


class Login(Base):
    """A browser that is logged in."""

    __tablename__ = "login"
    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int] = mapped_column(sa.ForeignKey("account.id", ondelete="CASCADE"), index=True)
    digest: Mapped[str] = mapped_column(sa.String(64), unique=True)  # SHA-256 of the cookie
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime]
    address: Mapped[str] = mapped_column(sa.String(60))
    browser: Mapped[str] = mapped_column(sa.String(200))


class ApiKey(Base):
    """A key for scripts: it does at most what its scope and its owner's role allow."""

    __tablename__ = "api_key"
    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int] = mapped_column(sa.ForeignKey("account.id", ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(sa.String(60))
    scope: Mapped[str] = mapped_column(sa.String(10))  # read, write, admin
    digest: Mapped[str] = mapped_column(sa.String(64), unique=True)  # SHA-256 of the key
    hint: Mapped[str] = mapped_column(sa.String(20))  # how it begins, to know it again
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Audit(Base):
    """A change that somebody made. Written with the change, in one transaction."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now, index=True)
    account_id: Mapped[int | None] = mapped_column(sa.ForeignKey("account.id", ondelete="SET NULL"))
    who: Mapped[str] = mapped_column(sa.String(60))  # the name as it was
    way: Mapped[str] = mapped_column(sa.String(60))  # login, key <name>, command line
    address: Mapped[str] = mapped_column(sa.String(60))  # where from
    action: Mapped[str] = mapped_column(sa.String(200))  # what: a method and the route's path, or words
    target: Mapped[str] = mapped_column(sa.String(300))  # of what
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)
