"""Harvests that are stored: listed, and deleted bit by bit while nothing else is touched."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import JobError, NotFound
from server.db import Database
from server.settings import Settings
from server.store import stored_harvests
from server.store.stored_harvests import delete, stored
from server.tables import (
    SAE,
    Base,
    Context,
    Corpus,
    Example,
    Feature,
    FeatureDetail,
    FeatureHead,
    Harvest,
    HarvestPart,
    HeadSummary,
    Job,
    Model,
)
from tests.upgraded import upgraded

OF_A_HARVEST: tuple[type[Base], ...] = (Feature, FeatureDetail, FeatureHead, Context, Example, HarvestPart, HeadSummary)


def add_harvest(session: Session, sae: SAE, job_id: str, status: str, *, n_features: int = 12, n_heads: int = 2) -> int:
    """A harvest with rows in every table."""
    harvest = Harvest(sae_id=sae.id, corpus_id=1, job_id=job_id, config={}, status=status, n_tokens=1000, n_live=n_features)
    session.add(harvest)
    session.flush()
    context = Context(harvest_id=harvest.id, row=0, tokens=b"", texts=[])
    session.add_all([context, HarvestPart(harvest_id=harvest.id, part="features")])
    session.add(HeadSummary(harvest_id=harvest.id, head=0, n_led=1, n_led_norm=1, families={}, detail={}))
    session.flush()
    for idx in range(n_features):
        feature = Feature(
            harvest_id=harvest.id, idx=idx, n_fired=1, density=0.1, max_act=1.0, mean_act=1.0, top_head=0, top_head_share=1.0,
            shuffle_key=idx,
        )  # fmt: skip
        session.add(feature)
        session.flush()
        session.add(
            FeatureDetail(
                feature_id=feature.id, histogram={}, bands=[], head_norm=b"", head_dfa=b"", head_dfa_std=b"", promoted=[],
                suppressed=[], neighbours=[], evidence={},
            )
        )  # fmt: skip
        session.add_all(FeatureHead(harvest_id=harvest.id, head=head, idx=idx, norm_share=0.5) for head in range(n_heads))
        session.add_all(
            Example(
                feature_id=feature.id, context_id=context.id, band=0, rank=rank, dest=1, start=0, act=1.0, acts=b"", dfa=b"",
            )
            for rank in range(3)
        )  # fmt: skip
    return harvest.id


@pytest.fixture
def db(settings: Settings) -> Iterator[Database]:
    """One SAE with a replaced harvest, 1, and the published one, 2."""
    db = upgraded(settings, queue=False)
    with db.write() as session:
        session.add_all([Model(id=1, name="m", source={}), Corpus(id=1, name="c", source={})])
        session.flush()
        sae = SAE(
            name="x", model_id=1, layer=0, hook="h", arch="topk", d_in=4, d_sae=12, k=2, n_heads=2, config={}, folder="x",
            sha256="0",
        )  # fmt: skip
        session.add(sae)
        session.flush()
        add_harvest(session, sae, "harvest-x-1", "replaced")
        sae.harvest_id = add_harvest(session, sae, "harvest-x-2", "published")
    yield db
    db.close()


def counts(db: Database) -> dict[str, int]:
    with db.read() as session:
        return {t.__tablename__: session.scalar(sa.select(sa.func.count()).select_from(t)) or 0 for t in OF_A_HARVEST}


def test_a_deleted_harvest_leaves_nothing_and_the_other_whole(db: Database) -> None:
    before = counts(db)
    delete(db, 1)
    assert counts(db) == {name: n // 2 for name, n in before.items()}
    with db.read() as session:
        assert [(h.id, h.sae, h.status, h.n_live) for h in stored(session)] == [(2, "x", "published", 12)]
        assert session.scalars(sa.select(SAE.harvest_id)).one() == 2
    with pytest.raises(NotFound, match="no harvest 1"):
        delete(db, 1)


def test_the_published_one_is_only_deleted_when_forced_and_then_nothing_is_shown(db: Database) -> None:
    before = counts(db)
    with pytest.raises(JobError, match="pages of x show"):
        delete(db, 2)
    assert counts(db) == before
    delete(db, 2, force=True)
    with db.read() as session:
        assert session.scalars(sa.select(SAE.harvest_id)).one() is None
        assert [h.id for h in stored(session)] == [1]


def test_one_that_a_job_is_writing_is_left_alone(db: Database) -> None:
    with db.write() as session:
        session.add(Job(id="harvest-x-3", kind="harvest", title="t", config={}, status="running"))
        harvest_id = add_harvest(session, session.get_one(SAE, 1), "harvest-x-3", "running")
    with pytest.raises(JobError, match="cancel that job first"):
        delete(db, harvest_id)
    with db.write() as session:
        session.get_one(Job, "harvest-x-3").status = "cancelled"
    delete(db, harvest_id)
    with db.read() as session:
        assert session.get(Harvest, harvest_id) is None


def test_it_is_done_in_small_transactions_and_goes_on_where_it_was_broken_off(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each takes longer than it may, the next is smaller; broken off half way, a second call ends it."""
    monkeypatch.setattr(stored_harvests, "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(stored_harvests, "FIRST_CHUNK", 2)
    sizes: list[int] = []
    left = [8]
    real = db.write

    @contextmanager
    def watched() -> Iterator[Session]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        before = counts(db)["feature"]
        with real() as session:
            yield session
        sizes.append(before - counts(db)["feature"])

    monkeypatch.setattr(db, "write", watched)
    with pytest.raises(KeyboardInterrupt):
        delete(db, 1)
    with db.read() as session:
        assert session.get_one(Harvest, 1).status == "replaced"
    delete(db, 1)
    assert [size for size in sizes if size] == [2, *[1] * 5, 2, *[1] * 3]
    with db.read() as session:
        assert [h.id for h in stored(session)] == [2]
