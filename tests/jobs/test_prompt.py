"""The prompt page over a real engine and a real harvest of the tiny model: what is typed gets what the harvest gave."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import sqlalchemy as sa
import torch
import uvicorn
from fastapi.testclient import TestClient

from sae_core.corpus import Rows
from sae_core.saes import row_starts
from server.app import create_app
from server.db import Database
from server.engine import Engine, create_engine
from server.live import FeatureChanged, LayerAblated, LiveQuestion, PromptQuestion, SteerQuestion
from server.packing import I4, unpack
from server.settings import Settings
from server.store.examples import example_row
from server.store.features import feature_page
from server.store.saes import find_sae
from server.tables import Context, Example, Feature
from server.worker import Worker
from tests.jobs.conftest import HARVEST, Home, start, tiny_config


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


def test_means_are_those_of_the_harvest(harvested: Home) -> None:
    """A feature's over all tokens, as the harvest counted them; z's over the rows that it kept first."""
    engine = Engine(harvested.settings.model_copy(update={"device": "cpu"}), harvested.db)
    lens, sae = engine._open("mine")
    layer = sae.cfg.site.layer
    with harvested.db.read() as session:
        often = sa.select(Feature.idx).where(Feature.density < 0.9).order_by(Feature.n_fired.desc())
        index = session.scalars(often).first()
        rows = session.scalars(sa.select(Context.tokens).order_by(Context.row).limit(16)).all()
    assert index is not None
    # By the dictionary itself on all rows that were harvested, those of a silent feature too.
    swept = Rows.open(next((harvested.settings.data / "rows").glob("*/rows.json")).parent).train[: HARVEST.tokens // 32]
    whole = torch.from_numpy(swept.astype("int64"))
    zs = lens.read_z(whole, [layer])[layer]
    acts = sae.encode(zs)[~sae.excluded(zs, row_starts(whole, lens.row_start))][:, index]
    assert (acts == 0).double().mean() > 0.1
    mean = float(acts.double().mean())
    text = "the cat sat on a mat and then it ran home"
    row = torch.tensor([engine._tokens(lens, text, None, "text")])
    asked = SteerQuestion(features=[FeatureChanged(sae="mine", index=index, how="mean", at=[2, 3])], text=text)
    f = sae.encode(lens.read_z(row, [layer])[layer][0])[:, index]
    plus = torch.zeros(row.shape[1], lens.info.d_in)
    plus[[2, 3]] = (mean - f[[2, 3], None]) * sae.W_dec[index]
    found = engine.steer(asked)
    assert mean > 0
    assert found.changed_losses == pytest.approx(lens.token_losses(row, layer, lambda z: z + plus)[0].tolist(), rel=1e-4)

    tokens = torch.tensor(np.stack([unpack(one, I4) for one in rows]).astype("int64"))
    words = lens.read_z(tokens, [layer])[layer][~row_starts(tokens, lens.row_start)]

    def put(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z[:, :1], words.mean(0).expand(1, z.shape[1] - 1, -1)], 1)

    asked = SteerQuestion(ablations=[LayerAblated(layer=layer, how="mean")], watch=["mine"], text=text)
    for _ in range(2):  # the second time from what was kept
        found = engine.steer(asked)
        assert found.changed_losses == pytest.approx(lens.token_losses(row, layer, put)[0].tolist(), rel=1e-4)
    assert found.changed_losses != pytest.approx(found.losses, rel=1e-3)


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
