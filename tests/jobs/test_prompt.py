"""The prompt page over a real engine and a real harvest of the tiny model: what is typed gets what the harvest gave."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
import uvicorn
from fastapi.testclient import TestClient

from server.app import create_app
from server.db import Database
from server.engine import Engine, create_engine
from server.live import LiveQuestion, PromptQuestion
from server.settings import Settings
from server.store.examples import example_row
from server.store.features import feature_page
from server.store.saes import find_sae
from server.tables import Example, Feature
from server.worker import Worker
from tests.jobs.conftest import Home, start, tiny_config


@contextmanager
def engine_of(settings: Settings, db: Database) -> Iterator[Settings]:
    """The engine on a real port."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    settings = settings.model_copy(update={"engine_port": listening.getsockname()[1], "device": "cpu"})
    server = uvicorn.Server(uvicorn.Config(create_engine(settings, db), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield settings
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture
def harvested(home: Home) -> Home:
    """The tiny model's SAE `mine`, trained and harvested."""
    job_id = home.jobs.enqueue_train(tiny_config(), name="mine")
    worker = Worker(home.settings, home.db)
    start(worker)
    try:
        assert home.wait(job_id) == "done", home.error(job_id)
        follow = next(record.id for record in home.jobs.list() if record.kind == "harvest")
        assert home.wait(follow) == "done", home.error(follow)
    finally:
        worker.close()
    return home


def text_of(found: str) -> str:
    """A page's visible words."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", found))


def test_a_stored_examples_text_typed_in_gives_its_stored_numbers(harvested: Home) -> None:
    """Tokenisation, row start, dtype and folding are the harvest's: the text of stored examples is typed, and each activation
    along the row, the pre-activation and the bias come out as they were stored."""
    engine = Engine(harvested.settings.model_copy(update={"device": "cpu"}), harvested.db)
    lens, _ = engine._open("mine")
    compared = 0
    with harvested.db.read() as session:
        door = find_sae(session, "mine")
        indices = session.scalars(
            sa.select(Feature.idx).join(Example, Example.feature_id == Feature.id).distinct().order_by(Feature.idx).limit(12)
        ).all()
        for index in indices:
            page = feature_page(session, door, index, every=True)
            for example in page.examples[:3]:
                row = example_row(session, door, index, example.band, example.rank)
                text = "".join(lens.token_texts(row.tokens[1:]))
                typed = engine._tokens(lens, text, None, "text")
                assert typed == list(row.tokens), "a byte-level tokenizer gives a row's text its tokens back"
                prompt = engine.prompt(PromptQuestion(saes=["mine"], text=text, at=example.dest)).prompt.saes[0]
                found = {one.index: one.activation for one in prompt.by_position[example.dest]}
                assert found[index] == pytest.approx(example.act, rel=1e-2), "stored to 0.7 %"
                alone = engine.attribute(LiveQuestion(sae="mine", index=index, text=text, dest=example.dest))
                assert alone.preacts[example.dest] == pytest.approx(example.preact, rel=1e-4, abs=1e-4)
                assert alone.bias == pytest.approx(example.bias, rel=1e-4, abs=1e-5)
                by_head = [sum(given) for given in alone.dfa]
                assert by_head == pytest.approx(example.by_head, rel=2e-2, abs=2e-2 * example.abs_dfa)
                compared += 1
    assert compared > 10


def test_the_page_shows_what_the_engine_found_and_takes_a_feature_apart(harvested: Home) -> None:
    text = "the cat sat on a mat and then it ran home"
    with engine_of(harvested.settings, harvested.db) as settings:
        engine = Engine(settings, harvested.db)
        told = engine.prompt(PromptQuestion(saes=["mine"], text=text, at=4)).prompt.saes[0]
        with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
            form = {"text": text, "saes": "sae:mine"}
            page = client.post("/prompt", data={**form, "do": "ask"})
            while "do=" not in page.text and "Look again" in page.text:
                ticket = re.search('name="ticket" value="([^"]+)"', page.text)
                assert ticket
                page = client.post("/prompt/look", data={**form, "ticket": ticket[1]})
            assert page.status_code == 200, page.text
            picked = client.post("/prompt", data={**form, "pick": "token:4:"})
            shown = {int(index) for index in re.findall(r'<th scope="row"><a href="/saes/mine/features/(\d+)">', picked.text)}
            assert shown == {one.index for one in told.by_position[4]}
            first = told.by_position[4][0].index
            apart = client.post("/prompt", data={**form, "at": "4", "pick": f"feature:{first}@4@mine"})
            alone = engine.attribute(LiveQuestion(sae="mine", index=first, text=text, dest=4))
            for given in (sum(map(sum, alone.dfa)), alone.bias):
                assert f"{given:+.3g}".replace("-", "−").rstrip("0") in apart.text
            assert "What it writes to the next token" in text_of(apart.text)
            gone = client.post("/prompt", data={"text": text, "saes": "sae:gone"})
            assert (gone.status_code, "There is no SAE called" in gone.text, text in gone.text) == (422, True, True)
            long = client.post("/prompt", data={**form, "text": "cat " * 600})
            assert (long.status_code, "tokens; at most" in long.text) == (422, True)
