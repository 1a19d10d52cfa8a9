"""A removed document is nowhere in the data folder, and in nothing that is made later."""

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from sae_core.config import CorpusSource, HarvestJob
from sae_core.corpus import document_hash, documents, prepare_rows
from sae_core.errors import JobError, UsageError
from server import cli
from server.app import create_app
from server.db import Database
from server.keeping import removal
from server.settings import Settings
from server.store import accounts, removals
from server.store import jobs as store
from server.store.redact import REMOVED
from server.tables import Context, Corpus, Example, Harvest, Label, Note, RemovedDocument, Study
from server.worker import Worker
from tests.core.tiny_models import save_tiny
from tests.jobs.conftest import HARVEST, make_home, start, tiny_config, write_text
from tests.keeping.conftest import home, new_database
from tests.web.factory import PROSE, Shape

LETTER = PROSE[5]
PHRASES = ("missing parcel", "the wrong address", "your letter of the third", "look into the matter of the missing")


def everything(folder: Path) -> bytes:
    """All bytes of a folder, journals included."""
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.fixture(params=["sqlite", "postgresql"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Settings, Database]]:
    """A harvest of six documents, with a study, a note and a label that quote one of them."""
    url = new_database(request.getfixturevalue("postgres")) if request.param == "postgresql" else None
    settings = home(tmp_path / "data", url, Shape(n_features=30, n_dead=2, running_job=False))
    source = tmp_path / "six.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in PROSE))
    database = Database(settings.url)
    with database.write() as session:
        corpus = session.get_one(Corpus, session.scalars(sa.select(Harvest.corpus_id)).one())
        corpus.source = CorpusSource(location=str(source)).model_dump(mode="json")
        tokens = re.findall(r"\s?\S+", LETTER)
        session.add(
            Study(
                job_id="study-x", kind="specificity", title="t", model_id=1, sae_id=1, feature=1, config={},
                result={"top": [{"texts": tokens[4:20], "at": 3}], "summary": "fine"},
            )
        )  # fmt: skip
        session.add(Note(sae_id=1, idx=1, text=f"Fires in: {LETTER[20:140]}; why?", author="Maren"))
        session.add(Label(sae_id=1, idx=1, text="letters", author="Maren", method="person"))
        settings_name = corpus.name
    yield settings.model_copy(update={"worker_id": settings_name}), database
    database.close()


def of_letter(texts: list[str]) -> bool:
    return "parcel" in "".join(texts) or "Okafor" in "".join(texts)


def test_its_text_is_nowhere_in_the_database_and_pages_say_so(stored: tuple[Settings, Database]) -> None:
    settings, db = stored
    name = settings.worker_id
    with db.read() as session:
        before = {row.id: row.texts for row in session.scalars(sa.select(Context))}
        n_examples = session.scalar(sa.select(sa.func.count(Example.id)))
        feature = session.scalars(
            sa.select(sa.text("idx"))
            .select_from(sa.text("feature join example on example.feature_id = feature.id"))
            .where(sa.text("context_id in (select id from context where row = 35) and band = 0"))
        ).first()
    mine = {key for key, texts in before.items() if of_letter(texts)}
    assert 0 < len(mine) < len(before)
    if not settings.database_url:
        raw = everything(settings.data)
        run = json.dumps(before[min(mine)][8:16], ensure_ascii=False, separators=(",", ":"))[1:-1].encode()
        assert run in raw
        assert b"missing parcel and i am sorry" in raw, "as it is searched"
    found = removal.find(settings, db, name, removal.search(removals_source(db, name), digest=document_hash(LETTER)[:12]))
    assert (found.held.contexts, found.held.studies, found.held.written) == (len(mine), 1, 1)
    assert removal.remove(settings, db, found) == found.held

    with db.read() as session:
        after = {row.id: row for row in session.scalars(sa.select(Context))}
        assert {key: row.texts for key, row in after.items() if key not in mine} == {
            key: texts for key, texts in before.items() if key not in mine
        }
        for key in mine:
            assert len(after[key].texts) == len(before[key])
            left = "".join(text for text in after[key].texts[1:] if text != REMOVED).replace(" and", "").strip()
            assert left == "", "the padding of the factory's rows is no part of the document"
        assert session.scalar(sa.select(sa.func.count(Example.id))) == n_examples
        assert REMOVED in session.scalars(sa.select(Note.text)).one()
        assert session.scalars(sa.select(Label.text)).one() == "letters"
        texts = session.scalars(sa.select(Study.result)).one()["top"][0]["texts"]
        assert set(texts) == {REMOVED}
        assert session.scalars(sa.select(RemovedDocument.digest)).all() == [document_hash(LETTER)]
        change = accounts.audit_page(session).changes[0]
        assert (change.action, change.target) == ("corpus remove-document", name)
        assert not any(LETTER[:20] in str(one.detail) for one in accounts.audit_page(session).changes)
        searched = "context_text match 'parcel'" if not settings.database_url else "words @@ to_tsquery('simple', 'parcel')"
        assert session.scalar(sa.text(f"select count(*) from context_text where {searched}")) == 0
    if not settings.database_url:
        raw = everything(settings.data)
        assert run not in raw
        for phrase in PHRASES:
            assert phrase.encode() not in raw
            assert phrase.lower().encode() not in raw
    assert feature is not None
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        page = client.get(f"/saes/smollm2-l17/features/{feature}").text
        assert "█ stands for text that was removed from the corpus" in page
    again = removal.find(settings, db, name, [LETTER])
    assert (again.held.contexts, again.held.studies, again.held.written) == (0, 0, 0)


def removals_source(db: Database, name: str) -> CorpusSource:
    from server.store import registry

    with db.read() as session:
        return registry.corpus(session, name).source


def test_documents_are_named_by_text_part_hash_and_place(stored: tuple[Settings, Database]) -> None:
    settings, db = stored
    source = removals_source(db, settings.worker_id)
    everyone = [document.text for document in documents(source)]
    assert removal.search(source, index=2) == [everyone[2]]
    assert removal.search(source, digest=document_hash(everyone[3])) == [everyone[3]]
    assert removal.search(source, text="in 1846 the planet".replace("in", "In")) == [everyone[2]]
    assert removal.search(source, text="long gone from the source") == ["long gone from the source"]
    with pytest.raises(UsageError, match="no such document"):
        removal.search(source, index=99)
    with pytest.raises(UsageError, match="at least 8"):
        removal.search(source, digest="abc")
    said = CliRunner().invoke(
        cli.app, ["corpus", "remove-document", settings.worker_id, "--id", "5", "--data", str(settings.data)],
        env={"HEADSCOPE_DATABASE_URL": settings.database_url or ""} if settings.database_url else {},
    )  # fmt: skip
    assert isinstance(said.exception, UsageError)
    assert re.search(r"out of \d+ rows of text with \d+ examples, 1 studies, 1 labels", str(said.exception))
    with db.read() as session:
        assert session.scalars(sa.select(RemovedDocument)).all() == [], "without --yes nothing happens"


def test_rows_are_cut_without_it_though_the_source_still_has_it(tmp_path: Path) -> None:
    texts = [f"document {n} says " + " ".join(f"word{n}x{i}" for i in range(40)) for n in range(30)]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    vocabulary: dict[str, int] = {}

    def encode(batch: list[str]) -> list[list[int]]:
        return [[vocabulary.setdefault(word, len(vocabulary) + 1) for word in text.split()] for text in batch]

    from sae_core.config import RowsConfig

    def cut(without: frozenset[str]) -> tuple[Path, set[int]]:
        cfg = RowsConfig(context=16, tokens=4000, heldout_tokens=64)
        work = prepare_rows(
            CorpusSource(location=str(path)), cfg, encode=encode, row_start=0, tokenizer_fingerprint="t",
            folder=tmp_path / "rows", without=without,
        )  # fmt: skip
        try:
            while True:
                next(work)
        except StopIteration as end:
            rows = end.value
        return rows.folder, set(np.unique(np.concatenate([rows.train.ravel(), rows.heldout.ravel()])).tolist())

    whole, every = cut(frozenset())
    assert cut(frozenset())[0] == whole, "an empty list changes no name"
    left, fewer = cut(frozenset({document_hash(texts[4])}))
    assert left != whole
    mine = {vocabulary[word] for word in texts[4].split() if "4x" in word}
    assert mine & every
    assert not mine & fewer


def test_a_worker_harvests_without_it_and_no_file_of_a_job_keeps_it(tmp_path: Path) -> None:
    text = write_text(tmp_path / "words.txt")
    made = make_home(tmp_path, save_tiny("llama", tmp_path / "tiny-llama"), text)
    settings, db = made.settings, made.db
    worker = Worker(settings.model_copy(update={"device": "cpu"}), db)
    start(worker)
    try:
        train = made.jobs.enqueue_train(tiny_config(tokens=8192, passes=1))
        assert made.wait(train) == "done", made.error(train)
        with db.read() as session:
            harvest = store.children(session, train)[0].id
        assert made.wait(harvest) == "done", made.error(harvest)
        source = removals_source(db, "words")
        kept = ((one.text, removal.find(settings, db, "words", [one.text]).held) for one in documents(source))
        document = next(text for text, held in kept if held.contexts)
        (settings.data / "jobs" / train).mkdir(exist_ok=True)
        (settings.data / "jobs" / train / "left").write_text("what a failed run left")
        found = removal.find(settings, db, "words", [document])
        assert found.held.contexts > 0
        assert {folder.parent.name for folder in found.folders} == {"rows", "jobs"}
        removal.remove(settings, db, found)
        assert not list((settings.data / "rows").glob("*/train.npy"))
        assert not (settings.data / "jobs" / train).exists()
        with closing(sqlite3.connect(settings.data / "jobs.db")) as connection:
            held = connection.execute("select count(*) from operation_outputs where workflow_uuid = ?", (train,)).fetchone()[0]
        assert held == 0
        sae = train.removeprefix("train-").rsplit("-", 1)[0]
        job = made.jobs.enqueue_harvest(
            HarvestJob(
                saes=(sae,),
                corpus="words",
                rows=tiny_config(tokens=8192).rows,
                harvest=HARVEST.model_copy(update={"tokens": 6000}),
            )
        )
        assert made.wait(job) == "done", made.error(job)
        assert removal.find(settings, db, "words", [document]).held.contexts == 0, "nor in what was harvested afterwards"
        with db.write() as session:
            store.create(session, "train-z-1", "train", "t", {"corpus": "words"})
            store.start_attempt(session, "train-z-1", "somebody")
        with pytest.raises(JobError, match="train-z-1 reads words and has begun"):
            removal.remove(settings, db, found)
    finally:
        worker.close()
        made.jobs.close()
        db.close()
    with db.read() as session:
        assert removals.hashes(session, "words") == {document_hash(document)}
    db.close()
