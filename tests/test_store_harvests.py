"""Writing a harvest: each part counts once, readers see all or nothing, and the identity survives the database.

Everything runs on SQLite, and on a PostgreSQL server of its own where the machine has one.
"""

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from sae_core.config import CorpusSource, ModelSource
from sae_core.errors import Fenced, JobError
from sae_core.harvest import HarvestResult, harvest, row_records
from sae_core.lens import load_lens
from sae_core.records import HeadRecord
from server.db import Database, _compact
from server.packing import ERROR, F4, FLOOR, I4, pack, read_acts, read_dfa, unfold, unpack
from server.settings import Settings
from server.store import harvests, jobs
from server.store.harvests import (
    PUBLISHED,
    REPLACED,
    RUNNING,
    begin,
    publish,
    stored_gaps,
    write_features,
    write_heads,
    write_part,
)
from server.tables import (
    SAE,
    Context,
    Corpus,
    Example,
    Feature,
    FeatureDetail,
    FeatureHead,
    Harvest,
    HarvestPart,
    HeadSummary,
    Model,
)
from tests.core.tiny_harvest import CFG, tiny_rows, tiny_sae
from tests.core.tiny_models import save_tiny
from tests.upgraded import upgraded

TABLES = (Feature, FeatureDetail, FeatureHead, HeadSummary, Context, Example, HarvestPart)
HEADS = [
    HeadRecord(0, 12, 9, {"induction": 4, "unclear": 8}, 0.8, 0.4, {"top": [[3, 0.7], [5, 0.6]], "in_both": 1}),
    HeadRecord(1, 0, 1, {}, None, None, {"top": []}),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> HarvestResult:
    folder = save_tiny("llama", tmp_path_factory.mktemp("llama"))
    lens, rows = load_lens(ModelSource(location=str(folder)), name="llama", cache=folder.parent), tiny_rows()
    reports = harvest(lens, tiny_sae(lens, rows), rows, CFG, tmp_path_factory.mktemp("harvest"))
    while True:
        try:
            next(reports)
        except StopIteration as end:
            found: HarvestResult = end.value
            return found


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, settings: Settings) -> sa.URL:
    """An empty database's address."""
    if request.param == "sqlite":
        upgraded(settings, queue=False).close()
        return settings.url
    server: sa.URL = request.getfixturevalue("postgres")
    name = f"t{uuid.uuid4().hex}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    return server.set(database=name)


@pytest.fixture
def db(url: sa.URL) -> Iterator[Database]:
    db = Database(url)
    db.upgrade()
    with db.write() as session:
        session.add(Model(name="llama", source=ModelSource(location="llama").model_dump()))
        session.add(Corpus(name="text", source=CorpusSource(location="text").model_dump()))
        session.flush()
        facts: dict[str, Any] = {"layer": 2, "hook": "h", "arch": "batchtopk", "d_in": 64, "d_sae": 40, "k": 8, "n_heads": 4}
        session.add(SAE(name="a", model_id=1, config={}, folder="a", sha256="0", **facts))
        for job in ("first", "second"):
            jobs.create(session, job, "harvest", job, {})
            jobs.start_attempt(session, job, "worker")
    yield db
    db.close()


def fence_of(job: str, attempt: int = 1) -> harvests.Fence:
    return lambda session: jobs.check(session, job, attempt)


def begun(db: Database, result: HarvestResult, job: str = "first") -> int:
    return begin(
        db,
        sae_id=1,
        corpus_id=1,
        job_id=job,
        config=CFG.model_dump(),
        totals=result.features.totals,
        fence=fence_of(job),
    )


def write_all(db: Database, result: HarvestResult, harvest_id: int, job: str = "first", attempt: int = 1) -> None:
    fence = fence_of(job, attempt)
    write_features(db, harvest_id, result.features, fence)
    write_heads(db, harvest_id, HEADS, fence)
    for part in range(len(result.parts)):
        write_part(db, harvest_id, part, row_records(result.features, result.parts, part), fence)


def counts(db: Database) -> dict[str, int]:
    with db.read() as session:
        return {table.__tablename__: session.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in TABLES}


def published(db: Database) -> int | None:
    with db.read() as session:
        return session.scalars(sa.select(SAE.harvest_id)).one()


def test_what_is_written_is_what_was_found(db: Database, result: HarvestResult) -> None:
    harvest_id = begun(db, result)
    write_all(db, result, harvest_id)
    examples = {(e.feature, e.band, e.rank): e for e in result.examples}
    assert len(examples) > 100
    with db.read() as session:
        stored = session.execute(sa.select(Example, Feature.idx, Context).join(Feature).join(Context)).all()
        assert len(stored) == len(examples)
        for row, idx, context in stored:
            e = examples[idx, row.band, row.rank]
            assert (row.dest, row.start, context.row) == (e.dest, e.start, e.row)
            acts, dfa = read_acts(row), read_dfa(row)
            assert (row.act, dfa.preact, dfa.bias, dfa.abs_dfa) == pytest.approx((e.act, e.preact, e.bias, e.abs_dfa), rel=1e-7)
            np.testing.assert_array_equal(acts.pos, e.acts_pos)
            np.testing.assert_allclose(acts.value, e.acts_value, rtol=ERROR, atol=FLOOR * e.acts_value.max())
            order = np.lexsort((dfa.src, dfa.head))
            wanted = np.lexsort((e.dfa_src, e.dfa_head))
            np.testing.assert_array_equal(dfa.src[order], e.dfa_src[wanted])
            np.testing.assert_array_equal(dfa.head[order], e.dfa_head[wanted])
            np.testing.assert_allclose(dfa.value[order], e.dfa_value[wanted], rtol=ERROR, atol=2 * FLOOR * e.abs_dfa)
            assert len(context.texts) == len(unpack(context.tokens, I4)) == 20
        features = session.execute(sa.select(Feature, FeatureDetail).join(FeatureDetail)).all()
        for record, (feature, detail) in zip(result.features, features, strict=True):
            assert (feature.idx, feature.n_fired, feature.family) == (record.idx, record.n_fired, record.family)
            assert detail.promoted == [[i, text.replace("\0", "\u2400"), value] for i, text, value in record.promoted]
            assert unfold(detail.histogram, log=True)[1] == tuple(record.histogram["counts"])
            assert unfold(detail.histogram, log=True)[0] == pytest.approx(record.histogram["edges"], rel=1e-5)
            assert unfold(detail.logits, log=False)[1] == tuple(record.logits.get("counts", ()))
            assert unfold(detail.logits, log=False)[0] == pytest.approx(record.logits.get("edges", ()), rel=1e-4, abs=1e-4)
        assert len({feature.shuffle_key for feature, _ in features}) == 40
        heads = session.scalars(sa.select(FeatureHead).where(FeatureHead.idx == 0).order_by(FeatureHead.head)).all()
        assert sum(head.norm_share for head in heads) == pytest.approx(1, abs=1e-5)
        assert sum(head.dfa_share or 0 for head in heads) == pytest.approx(1, abs=1e-5)
        dead = session.scalar(sa.select(sa.func.count()).select_from(FeatureHead).where(FeatureHead.idx >= 37))
        assert dead == 0


def test_the_identity_holds_as_read_back_from_the_database(db: Database, result: HarvestResult) -> None:
    harvest_id = begun(db, result)
    write_all(db, result, harvest_id)
    with db.read() as session:
        gaps = stored_gaps(session, harvest_id)
    assert len(gaps) == len(list(result.examples))
    assert gaps.max() <= 1e-3
    stated = np.array([e.gap for e in result.examples])
    assert np.sort(gaps)[-20:] == pytest.approx(np.sort(stated)[-20:], abs=3e-7)  # packing adds nothing to be seen
    with db.write() as session:  # the check must see what is wrong
        for row in session.scalars(sa.select(Example)):
            found = read_dfa(row)
            row.dfa = row.dfa[:17] + pack(np.array([found.bias + 0.01 * found.abs_dfa]), F4) + row.dfa[21:]
    with db.read() as session:
        assert stored_gaps(session, harvest_id).max() > 1e-3


def test_parts_written_twice_count_once(db: Database, result: HarvestResult) -> None:
    harvest_id = begun(db, result)
    write_all(db, result, harvest_id)
    before = counts(db)
    assert begun(db, result) == harvest_id
    write_all(db, result, harvest_id)
    assert counts(db) == before


def test_a_writer_killed_anywhere_is_taken_over_without_loss_or_repeat(
    db: Database, result: HarvestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begun(db, result)
    monkeypatch.setattr(harvests, "FEATURES_AT_ONCE", 7)
    monkeypatch.setattr(harvests, "EXAMPLES_AT_ONCE", 25)
    write_all(db, result, whole)
    expected = counts(db)
    assert expected["harvest_part"] > 12
    with db.write() as session:
        for table in (Example, Context, HeadSummary, FeatureHead, FeatureDetail, Feature, HarvestPart):
            session.execute(sa.delete(table))

    class Killed(Exception):
        pass

    for patience in range(1, 200):
        left = patience

        def dying(session: Session) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                session.execute(sa.select(1))
                raise Killed

        try:
            write_features(db, whole, result.features, dying)
            write_heads(db, whole, HEADS, dying)
            for part in range(len(result.parts)):
                write_part(db, whole, part, row_records(result.features, result.parts, part), dying)
            break
        except Killed:
            continue
    assert counts(db) == expected


def test_a_failing_chunk_leaves_no_rows_and_no_mark(db: Database, result: HarvestResult, monkeypatch: pytest.MonkeyPatch) -> None:
    harvest_id = begun(db, result)
    write_features(db, harvest_id, result.features, fence_of("first"))
    before = counts(db)
    rows = list(row_records(result.features, result.parts, 0))

    def broken(*_: object) -> list[bytes]:
        raise RuntimeError("lost")

    monkeypatch.setattr(harvests, "pack_dfa", broken)
    with pytest.raises(RuntimeError, match="lost"):
        write_part(db, harvest_id, 0, rows, fence_of("first"))
    assert counts(db) == before


def test_a_worker_that_was_overtaken_writes_nothing(db: Database, result: HarvestResult) -> None:
    harvest_id = begun(db, result)
    write_features(db, harvest_id, result.features, fence_of("first"))
    write_heads(db, harvest_id, HEADS, fence_of("first"))
    with db.write() as session:
        jobs.start_attempt(session, "first", "another worker")
    before = counts(db)
    with pytest.raises(Fenced):
        write_all(db, result, harvest_id)
    with pytest.raises(Fenced):
        publish(db, harvest_id, 0, fence_of("first"))
    assert counts(db) == before
    assert published(db) is None
    write_all(db, result, harvest_id, attempt=2)
    publish(db, harvest_id, len(result.parts), fence_of("first", 2))
    assert published(db) == harvest_id


def test_heads_are_written_once_and_a_harvest_without_them_is_not_published(db: Database, result: HarvestResult) -> None:
    harvest_id, fence = begun(db, result), fence_of("first")
    write_features(db, harvest_id, result.features, fence)
    for part in range(len(result.parts)):
        write_part(db, harvest_id, part, row_records(result.features, result.parts, part), fence)
    with pytest.raises(JobError, match="heads not written"):
        publish(db, harvest_id, len(result.parts), fence)
    for _ in range(2):
        write_heads(db, harvest_id, HEADS, fence)
    with db.read() as session:
        rows = session.scalars(sa.select(HeadSummary).order_by(HeadSummary.head)).all()
        assert [{name: getattr(row, name) for name in vars(head)} for row, head in zip(rows, HEADS, strict=True)] == [
            vars(head) for head in HEADS
        ]
    publish(db, harvest_id, len(result.parts), fence)
    assert published(db) == harvest_id


def test_readers_see_a_harvest_only_when_it_is_whole(db: Database, result: HarvestResult) -> None:
    harvest_id, fence = begun(db, result), fence_of("first")
    write_features(db, harvest_id, result.features, fence)
    with pytest.raises(JobError, match="heads, part 0, part 1"):
        publish(db, harvest_id, len(result.parts), fence)
    assert published(db) is None
    write_all(db, result, harvest_id)
    assert published(db) is None
    publish(db, harvest_id, len(result.parts), fence)
    examples = list(result.examples)
    with db.read() as session:
        row = session.get_one(Harvest, harvest_id)
        assert session.scalars(sa.select(SAE.harvest_id)).one() == harvest_id
    assert (row.status, row.n_examples, row.n_live, row.n_rows, row.context) == (PUBLISHED, len(examples), 37, 24, 20)
    assert row.worst_gap == max(e.gap for e in examples)
    assert row.n_tokens == result.selection.n_tokens
    assert row.published_at is not None


def test_a_later_harvest_replaces_the_one_before_and_publishing_twice_changes_nothing(
    db: Database, result: HarvestResult
) -> None:
    first = begun(db, result)
    write_all(db, result, first)
    publish(db, first, len(result.parts), fence_of("first"))
    second = begun(db, result, "second")
    assert status(db, first, second) == (PUBLISHED, RUNNING)
    assert published(db) == first
    write_all(db, result, second, "second")
    publish(db, second, len(result.parts), fence_of("second"))
    assert status(db, first, second) == (REPLACED, PUBLISHED)
    publish(db, first, len(result.parts), fence_of("first"))  # as a step that is repeated after a crash
    publish(db, second, len(result.parts), fence_of("second"))
    assert status(db, first, second) == (REPLACED, PUBLISHED)
    assert published(db) == second


def status(db: Database, *ids: int) -> tuple[str, ...]:
    with db.read() as session:
        return tuple(session.get_one(Harvest, i).status for i in ids)


def test_chunks_are_the_same_whenever_they_are_cut() -> None:
    def cut() -> list[list[int]]:
        return list(harvests.cut(iter([3, 1, 9, 2, 2, 2]), lambda n: n, 4))

    assert cut() == cut() == [[3, 1], [9], [2, 2], [2]]


def test_the_store_is_read_without_torch() -> None:
    code = "import server.store.harvests, sae_core.records, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_much_json_is_deflated_on_sqlite_and_text_from_before_is_still_read(db: Database, result: HarvestResult) -> None:
    harvest_id = begun(db, result)
    write_features(db, harvest_id, result.features, fence_of("first"))
    raw = sa.text("select promoted from feature_detail where feature_id = :id")
    with db.write() as session:
        (feature_id, promoted), *_ = session.execute(sa.select(FeatureDetail.feature_id, FeatureDetail.promoted)).all()
        assert isinstance(promoted, list)
        if db.url.get_backend_name() == "sqlite":
            held, text = session.scalar(raw, {"id": feature_id}), json.dumps(promoted)
            assert isinstance(held, bytes)
            assert len(held) < len(text)
            session.execute(sa.text("update feature_detail set promoted = :text"), {"text": text})
        found = session.scalars(sa.select(FeatureDetail.promoted).where(FeatureDetail.feature_id == feature_id)).one()
    assert found == promoted


@given(st.lists(st.text(st.characters(exclude_categories=())) | st.sampled_from(["\\ud83d", "\\\ud83d", "🙂", "\ude42\ud83d"])))
def test_no_half_of_a_character_is_stored_and_every_whole_one_is(texts: list[str]) -> None:
    kept = json.loads(_compact(texts))
    whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") for text in texts]
    halved = [re.sub("[\ud800-\udfff]", lambda half: f"⟨{ord(half[0]):X}⟩", text) for text in whole]
    assert kept == [text.replace("\0", "␀") for text in halved]
