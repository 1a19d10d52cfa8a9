"""The demo's journey: what it says first, what it queues once, and the whole of it on the real model with a small run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page
from rich.console import Console

from sae_core.config import CorpusSource, ModelSource
from sae_core.errors import UnknownModel
from server import demo, jobs
from server.db import Database
from server.estimates import Speed
from server.jobs import Jobs
from server.settings import Settings
from server.store import jobs as job_store
from server.store import registry
from tests.web.walk import listening, walk

QUICK, SLOW = Speed(1e15, 1e15), Speed(1e9, 1e9)


@pytest.fixture
def db(settings: Settings) -> Database:
    db = Database(settings.url)
    jobs.upgrade(settings, db)
    return db


def announced(settings: Settings, monkeypatch: pytest.MonkeyPatch, speed: Speed) -> tuple[str, int]:
    monkeypatch.setattr(demo, "_measured_speed", lambda _: speed)
    console = Console(record=True, width=10_000, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    cfg = demo._announce(settings, console)
    console.file.close()
    return console.export_text(), len(cfg.harvests)


def registered(db: Database, place: Path) -> None:
    place.write_bytes(b"")
    with db.write() as session:
        registry.add_model(session, demo.MODEL_NAME, ModelSource(location=str(place)))
        registry.add_corpus(session, demo.CORPUS_NAME, CorpusSource(location=str(place)))


def test_a_demo_that_only_queues_leaves_its_job_to_workers(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fetch_model", "fetch_text"):
        place = settings.cache / name
        place.write_bytes(b"")
        monkeypatch.setattr(demo, name, lambda _, place=place: place)
    demo.queue(settings)
    demo.queue(settings)
    assert status(db) == job_store.QUEUED


def status(db: Database, value: str | None = None) -> str:
    """The job's status, set to `value` first when one is given."""
    with db.write() as session:
        if value == job_store.CANCELLED:
            job_store.cancel(session, demo.JOB)
        return job_store.get(session, demo.JOB).status


def test_the_run_is_of_a_million_tokens_and_eight_times_as_wide_as_its_input() -> None:
    for slow in (False, True):
        cfg = demo.demo_config(slow=slow)
        assert cfg.rows.tokens >= 1_000_000
        assert cfg.expansion >= 8
        assert cfg.harvests[-1].tokens >= 1_000_000
    assert [h.tokens for h in demo.demo_config(slow=True).harvests] == sorted(h.tokens for h in cfg.harvests)


def test_it_says_downloads_disk_and_time_before_anything_starts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    said, harvests = announced(settings, monkeypatch, QUICK)
    assert re.search(
        r"downloads 141 MB, writes up to [\d.]+ GB to .*data and [\d.]+ GB to .*cache, and will take about \d+", said
    )
    assert harvests == 1


def test_a_slow_machine_publishes_a_small_harvest_first(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    said, harvests = announced(settings, monkeypatch, SLOW)
    assert re.search(r"will take about \d+ h", said)
    assert re.search(r"a harvest of [\d,]+ tokens is published first", said)
    assert harvests == 2


def test_nothing_is_downloaded_when_all_is_there(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("downloads/" + demo.MODEL_FILE, "demo/text.jsonl"):
        (settings.cache / name).parent.mkdir()
        (settings.cache / name).touch()
    assert "downloads nothing" in announced(settings, monkeypatch, QUICK)[0]


def test_this_process_stays_without_torch_while_it_measures() -> None:
    code = "import sys; from server import demo; s = demo._measured_speed('cpu'); print(s.float32 > 1e8, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_the_job_is_queued_once_and_again_only_after_it_was_cancelled(settings: Settings, db: Database, tmp_path: Path) -> None:
    assert demo._is_fresh(settings)
    registered(db, tmp_path / "weights")
    cfg = demo.demo_config(slow=False)
    demo._queue(settings, db, cfg)
    assert not demo._is_fresh(settings)
    demo._queue(settings, db, demo.demo_config(slow=True))
    queue = Jobs(settings, db)
    assert [(job.id, job.status, len(job.config["harvests"])) for job in queue.list()] == [(demo.JOB, "queued", 1)]
    assert status(db, "cancelled") == "cancelled"
    demo._queue(settings, db, cfg)
    assert status(db) == "queued"
    queue.close()


def test_a_cache_that_was_moved_away_is_said_in_a_sentence(
    settings: Settings, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fetch_model", "fetch_text"):
        monkeypatch.setattr(demo, name, lambda cache: cache / "x")
    registered(db, tmp_path / "weights")
    demo._register(settings, db, Console(quiet=True))
    (tmp_path / "weights").unlink()
    with pytest.raises(UnknownModel, match=r"knows the demo's model at .*weights, which is gone; set HEADSCOPE_CACHE"):
        demo._register(settings, db, Console(quiet=True))


# ----------------------------------------------------------------------------------------------- the whole of it, for real

# The demo with a smaller run, so that it takes a minute: everything else is as `headscope demo` does it.
SMALL = """
from sae_core.config import HarvestConfig, RowsConfig, Site, TrainConfig
from server import cli, demo

def small(*, slow):
    rows, harvest = RowsConfig(context=64, tokens=16_384, heldout_tokens=2_048), HarvestConfig(tokens=8_192, top_k=4, per_band=1)
    names = {"model": demo.MODEL_NAME, "corpus": demo.CORPUS_NAME}
    return TrainConfig(**names, site=Site(layer=1), rows=rows, expansion=1, k=16, batch=1024, harvests=(harvest,))

demo.demo_config = small
cli.main()
"""


def free_ports() -> int:
    """A port that is free, and the next one too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except OSError:
                continue
            return int(first.getsockname()[1])


class Demo:
    """A running demo whose output goes to a file."""

    def __init__(self, folder: Path, name: str, cache: Path) -> None:
        self.port, self.log = free_ports(), folder / f"{name}.log"
        ours = {"HEADSCOPE_DATA": str(folder / "data"), "HEADSCOPE_CACHE": str(cache), "HEADSCOPE_PORT": str(self.port)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", SMALL, "demo"], env=os.environ | ours, stdout=log, stderr=log)

    @property
    def token(self) -> str:
        """The start token in the address that was printed."""
        found = re.search(r"/start\?token=(\S+)", self.log.read_text())
        assert found, self.log.read_text()
        return found[1]

    def get(self, path: str) -> httpx.Response:
        as_its_owner = {"Authorization": f"Bearer {self.token}"}
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=as_its_owner, trust_env=False, timeout=20)

    def until(self, said: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while said not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert " failed" not in self.log.read_text(), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.process.terminate()


@pytest.fixture
def quiet_page(page: Page) -> Iterator[Page]:
    """A page on which any complaint of the browser fails the test."""
    yield from listening(page)


@pytest.mark.real
@pytest.mark.browser
def test_the_demo_publishes_is_walked_stops_cleanly_and_starts_again_on_what_is_there(
    smollm2: Path, demo_text: Path, cache: Path, tmp_path: Path, quiet_page: Page
) -> None:
    assert smollm2.is_relative_to(cache)
    assert demo_text.is_relative_to(cache)
    first = Demo(tmp_path, "first", cache)
    try:
        first.until("Headscope is at", 60)
        assert first.get("/").status_code == 200  # the page is up before there is anything to see
        first.until("Published after", 280)
        found = first.get(f"/saes/{demo.SAE_NAME}.json").json()
        assert httpx.get(f"http://127.0.0.1:{first.port}/", trust_env=False).status_code == 401
        quiet_page.goto(f"http://127.0.0.1:{first.port}/start?token={first.token}")
        walk(quiet_page, f"http://127.0.0.1:{first.port}")
    finally:
        assert first.interrupt() == 0
    assert found["overview"]["sae"]["harvest"]["worst_gap"] <= 1e-3
    assert found["overview"]["sae"]["harvest"]["n_live"] > 0

    second = Demo(tmp_path, "second", cache)
    try:
        second.until(f"/saes/{demo.SAE_NAME}", 30)
        again = second.get(f"/saes/{demo.SAE_NAME}.json").json()
    finally:
        assert second.interrupt() == 0
    assert again["overview"]["sae"] == found["overview"]["sae"]
    for word in ("Published after", "downloads", "Traceback"):
        assert word not in second.log.read_text()
