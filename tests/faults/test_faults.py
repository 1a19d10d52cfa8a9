"""What a lab's server meets in its years: a database that restarts, disks that fill, files that rot, processes that die."""

import asyncio
import gc
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from bench import _postgres, harvest_workers
from bench._served import free_port
from sae_core.config import HarvestJob, TrainConfig, Wishes
from sae_core.errors import DatabaseAway
from server import worker as workers
from server.app import create_app
from server.jobs import Jobs
from server.settings import Settings
from server.store import jobs as store
from server.store import registry
from server.tables import SAE, Example, Harvest
from tests.faults.conftest import Crew, home_of, quick, until
from tests.jobs.conftest import HARVEST, Home, tiny_config, wait_for
from tests.jobs.test_crashes import published
from tests.jobs.test_worker import working
from tests.processes import Command

QUICK = tiny_config(harvests=())
LONG = HARVEST.model_copy(update={"shard_rows": 16, "batch_rows": 4})


@pytest.fixture
def home(tmp_path: Path, tiny_folder: Path, tiny_text: Path) -> Iterator[Home]:
    """A data folder with SQLite."""
    made = home_of(quick(tmp_path), tiny_folder, tiny_text)
    yield made
    made.jobs.close()
    made.db.close()


def harvested(home: Home, **changes: Any) -> str:
    """The harvest of the SAE `x`, queued."""
    cfg = LONG.model_copy(update=changes)
    return home.jobs.enqueue_harvest(HarvestJob(saes=("x",), corpus="words", rows=QUICK.rows, harvest=cfg))


def trained(home: Home, crew: Crew) -> None:
    """An SAE `x`, and a worker that lives."""
    crew.start(home.settings)
    job_id = home.jobs.enqueue_train(QUICK, name="x")
    assert home.wait(job_id, seconds=200) == "done", home.error(job_id)


# ---- the database ----


@pytest.fixture
def restartable() -> Iterator[tuple[sa.URL, Any]]:
    """A PostgreSQL server that can be restarted."""
    if _postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    with _postgres.restartable() as found:
        yield found


@pytest.mark.timeout(600)
# A connection that is cut off while it is made is nobody's.
@pytest.mark.filterwarnings("ignore:<psycopg.Connection .* was deleted while still open:ResourceWarning")
def test_postgresql_restarts_in_a_harvest_and_under_readers(
    restartable: tuple[sa.URL, Any], tmp_path: Path, tiny_folder: Path, tiny_text: Path, crew: Crew
) -> None:
    url, restart = restartable
    home = home_of(quick(tmp_path, url), tiny_folder, tiny_text)
    trained(home, crew)
    first = harvested(home)
    assert home.wait(first, seconds=200) == "done", home.error(first)
    undisturbed = published(home.db)
    seen, stop = Counter[tuple[int, bool]](), threading.Event()

    def read() -> None:
        with TestClient(create_app(home.settings), base_url="http://127.0.0.1:8000") as web:
            while not stop.is_set():
                for path in ("/", "/saes/x", "/saes/x/features/3", "/jobs"):
                    answer = web.get(path)
                    seen[answer.status_code, "retry-after" in answer.headers] += 1

    reader = threading.Thread(target=read)
    reader.start()
    home.jobs.close()
    with closing(Jobs(home.settings, home.db)) as queue:
        again = queue.retry(first, even_done=True)
    for _ in range(2):
        until(lambda: running(home, again.id))
        restart()
        time.sleep(1.0)
    until(lambda: ended(home, again.id), 200)
    stop.set()
    reader.join(60)
    assert home.status(first) == "done", home.error(first)
    assert published(home.db) == undisturbed
    assert set(seen) <= {(200, False), (503, True)}, seen
    assert seen[200, False] > 0
    with home.db.read() as session:
        assert session.scalars(sa.select(Harvest.status).order_by(Harvest.id)).all().count("published") == 1
    with TestClient(create_app(home.settings), base_url="http://127.0.0.1:8000") as web:
        assert web.get("/saes/x/features/3").status_code == 200
    home.jobs.close()
    home.db.close()
    gc.collect()  # or one would complain in a later test


def running(home: Home, job_id: str) -> bool:
    try:
        job = home.jobs.get(job_id)
    except sa.exc.DBAPIError:
        return False
    return (job.status == store.RUNNING and job.phase is not None) or job.ended


def ended(home: Home, job_id: str) -> bool:
    try:
        return home.jobs.get(job_id).ended
    except sa.exc.DBAPIError:
        return False


# ---- readers ----


@contextmanager
def serving(home: Home, *arguments: str, **environment: str) -> Iterator[tuple[str, Command]]:
    """`headscope serve` as a process of its own."""
    port = free_port()
    env = os.environ | {"HEADSCOPE_DATA": str(home.settings.data), "HEADSCOPE_CACHE": str(home.settings.cache)} | environment
    process = Command("serve", "--port", port, *arguments, env=env)
    try:
        wait_for(lambda: answers(port))
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        assert process.wait(30) == 0


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)):
            return False
    return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=30).status_code == 200


@pytest.mark.timeout(600)
def test_two_hundred_readers_in_a_harvest_get_pages_or_a_clear_no(home: Home, crew: Crew) -> None:
    trained(home, crew)
    job_id = harvested(home)
    assert home.wait(job_id, seconds=200) == "done", home.error(job_id)
    before = published(home.db)
    home.jobs.retry(job_id, even_done=True)
    paths = ["/", "/saes/x", "/saes/x?sort=-max", "/saes/x/features/3", "/saes/x/features/5.json", "/saes/x/heads/0", "/jobs"]

    async def all_at_once(address: str) -> Counter[tuple[int, bool]]:
        limits, seen = httpx.Limits(max_connections=200), Counter[tuple[int, bool]]()
        async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as client:

            async def one(number: int) -> None:
                for at in range(2):
                    answer = await client.get(paths[(number + at) % len(paths)])
                    seen[answer.status_code, answer.headers.get("retry-after", "").isdigit()] += 1

            await asyncio.gather(*(one(number) for number in range(200)))
        return seen

    with serving(home, "--workers", "2", HEADSCOPE_WEB_WAITING="24") as (address, _):
        pages = {path: httpx.get(f"{address}{path}", timeout=60).text for path in paths[3:5]}
        with ThreadPoolExecutor(1) as apart:  # a thread that no browser test before has given an event loop
            seen = apart.submit(asyncio.run, all_at_once(address)).result()
        assert set(seen) == {(200, False), (503, True)}, seen
        assert sum(seen.values()) == 400
        assert home.wait(job_id, seconds=200) == "done", home.error(job_id)
        answered = {path: httpx.get(f"{address}{path}", timeout=60) for path in paths}
        assert {answer.status_code for answer in answered.values()} == {200}
        assert pages["/saes/x/features/5.json"] != "", "the pages before were pages"
    assert published(home.db) == before, "nothing is lost and nothing doubled"


def test_a_web_process_that_is_killed_is_started_again_while_the_other_answers(home: Home) -> None:
    with serving(home, "--workers", "2") as (address, process):

        def children() -> list[int]:
            return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]

        until(lambda: len(children()) == 2)
        victim = random.Random(1).choice(children())
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(children()) == 2 and victim not in children())
        for _ in range(8):
            assert httpx.get(f"{address}/", timeout=60).status_code == 200


# ---- the engine ----


@contextmanager
def engine(settings: Settings) -> Iterator[Command]:
    """`headscope engine` as a process of its own, killed at the end."""
    env = os.environ | {
        "HEADSCOPE_DATA": str(settings.data), "HEADSCOPE_CACHE": str(settings.cache), "HEADSCOPE_DEVICE": "cpu",
        "HEADSCOPE_ENGINE_PORT": str(settings.engine_port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = Command("engine", env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.timeout(600)
def test_an_engine_that_is_killed_again_and_again_is_right_or_says_that_it_is_away(home: Home, crew: Crew) -> None:
    trained(home, crew)
    crew.end()
    settings = home.settings.model_copy(update={"engine_port": free_port(), "live_per_minute": 10**6})
    text, draw = "the cat sat on the mat and the cat", random.Random(3)
    questions = [
        *(("attribution", {"sae": "x", "index": index, "text": text}) for index in range(3)),
        ("firings", {"sae": "x", "text": text, "features": [0, 1, 2], "top": 3}),
        ("prompt", {"saes": ["x"], "text": text, "top": 2}),
    ]
    seen, stop = list[tuple[int, int, Any, bool]](), threading.Event()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as web:

        def ask(number: int) -> int:
            what, question = questions[number]
            answer = web.post(f"/api/v1/live/{what}", json=question)
            seen.append((number, answer.status_code, answer.json(), "retry-after" in answer.headers))
            return answer.status_code

        def ask_on() -> None:
            while not stop.is_set():
                if ask(draw.randrange(len(questions))) != 200:
                    time.sleep(0.05)

        def right() -> int:
            return sum(status == 200 for _, status, _, _ in seen)

        with engine(settings):
            until(lambda: ask(0) == 200)
            before = [ask(number) for number in range(len(questions))]
            assert before == [200] * len(questions)
            undisturbed = {number: body for number, status, body, _ in seen if status == 200}
        asker = threading.Thread(target=ask_on)
        asker.start()
        try:
            for _ in range(4):
                with engine(settings):  # killed while it answers
                    known = right()
                    until(lambda known=known: right() > known + 3)  # type: ignore[misc]
                    time.sleep(draw.uniform(0, 0.2))
            with engine(settings):  # killed while it begins
                time.sleep(draw.uniform(0, 2.0))
            with engine(settings):
                known = right()
                until(lambda: right() > known + 10)
                stop.set()
                asker.join(60)
        finally:
            stop.set()
            asker.join(60)
    assert {status for _, status, _, _ in seen} == {200, 503}, Counter(status for _, status, _, _ in seen)
    for number, status, body, again in seen:
        if status == 200:
            assert body == undisturbed[number], "an answer is right or none"
        else:
            assert again
            assert body["error"]["code"] == "engine_away", body
            assert body["error"]["message"].startswith("The engine does not answer; start it with"), body


# ---- disks and files ----


def test_a_disk_that_fills_in_a_harvest_is_said_and_the_harvest_goes_on_when_there_is_room(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with working(home):
        sae = home.jobs.enqueue_train(QUICK, name="x")
        assert home.wait(sae, seconds=200) == "done", home.error(sae)
        with monkeypatch.context() as patch:
            patch.setattr(workers.sweep, "choose", full)  # when the scan's files are there
            job_id = harvested(home)
            assert home.wait(job_id) == "failed"
            assert "No room is left in" in (home.error(job_id) or "")
            assert any(home.folder(job_id).glob("scan-*.npz")), "what was done is kept"
        home.jobs.retry(job_id)
        assert home.wait(job_id, seconds=200) == "done", home.error(job_id)
    with home.db.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Example)) == len(published(home.db)) > 100


def test_an_sae_that_rotted_is_named_and_nothing_is_published(home: Home, crew: Crew) -> None:
    trained(home, crew)
    weights = home.settings.data / "saes" / "x" / "sae.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    job_id = harvested(home)
    assert home.wait(job_id) == "failed"
    assert f"{weights} cannot be read" in (home.error(job_id) or "")
    assert home.jobs.get(job_id).tries == 0, "it would not go better by itself"
    weights.write_bytes(whole)
    home.jobs.retry(job_id)
    assert home.wait(job_id, seconds=200) == "done", home.error(job_id)


def test_a_row_that_rotted_is_a_sentence_on_its_page_and_harms_no_other(home: Home, crew: Crew) -> None:
    trained(home, crew)
    job_id = harvested(home)
    assert home.wait(job_id, seconds=200) == "done", home.error(job_id)
    with home.db.write() as session:
        broken = session.scalars(sa.select(Example).order_by(Example.id)).first()
        assert broken is not None
        broken.dfa = b"\xff" * 7
        feature = broken.feature_id
        session.execute(sa.update(Example).where(Example.feature_id == feature).values(acts=b"\x01"))
        indexes = session.execute(sa.text("select id, idx from feature where n_fired > 0")).all()
    bad = next(idx for id, idx in indexes if id == feature)
    good = next(idx for id, idx in indexes if id != feature)
    with TestClient(create_app(home.settings), base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as web:
        answer = web.get(f"/saes/x/features/{bad}")
        assert answer.status_code == 500
        assert "damaged" in answer.text
        assert web.get(f"/saes/x/features/{good}").status_code == 200


# ---- jobs ----


def test_a_step_that_does_not_notice_is_broken_off_within_five_seconds_of_a_cancel(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def long(*_: object) -> None:
        begun.set()
        while True:
            sum(range(10_000))

    monkeypatch.setattr(workers, "_train", long)
    job_id = home.jobs.enqueue_train(QUICK)
    with working(home) as worker:
        assert begun.wait(60)
        home.jobs.cancel(job_id)
        at = time.monotonic()
        wait_for(lambda: not worker.busy, 30)
        assert time.monotonic() - at <= 5
        monkeypatch.undo()
        after = home.jobs.enqueue_train(QUICK, name="after")
        assert home.wait(after) == "done", home.error(after)
    assert home.status(job_id) == "cancelled"


def test_a_job_that_works_for_too_long_ends_with_a_sentence(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def long(*_: object) -> None:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(workers, "_train", long)
    job_id = Jobs(home.settings, home.db, Wishes(time_limit=1.5)).enqueue_train(QUICK)
    with working(home):
        assert home.wait(job_id) == "failed"
        assert "and its limit was 2 s" in (home.error(job_id) or "")
        assert home.jobs.get(job_id).tries == 0


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WAIT", 0.2)
    failures = iter([DatabaseAway("The database is away."), ConnectionResetError("reset")])
    train = workers._train

    def sometimes(run: workers.Run, cfg: TrainConfig) -> None:
        for error in failures if run.id == good else ():
            raise error
        train(run, cfg)

    monkeypatch.setattr(workers, "_train", sometimes)
    good = home.jobs.enqueue_train(QUICK, name="good")
    bad = home.jobs.enqueue_train(QUICK.model_copy(update={"corpus": "words"}), name="bad")
    with home.db.write() as session:
        row = session.get_one(store.Job, bad)
        row.config = {**row.config, "corpus": "gone"}
    with working(home):
        assert home.wait(good) == "done", home.error(good)
        assert home.wait(bad) == "failed"
    assert (home.jobs.get(good).tries, home.jobs.get(bad).tries) == (2, 0)


def test_a_harvest_on_four_workers_equals_that_of_one(home: Home, crew: Crew) -> None:
    trained(home, crew)
    job_id = harvested(home, shard_rows=2, batch_rows=1)  # slow enough for others to come in time
    assert home.wait(job_id, seconds=200) == "done", home.error(job_id)
    alone = published(home.db)
    with home.db.read() as session:
        assert store.parts(session, job_id, "scan") == []
    for _ in range(3):
        crew.start(home.settings)

    def all_there() -> bool:
        with home.db.read() as session:
            return len(store.workers(session)) == 4

    until(all_there)
    home.jobs.retry(job_id, even_done=True)
    assert home.wait(job_id, seconds=250) == "done", home.error(job_id)
    assert published(home.db) == alone
    with home.db.read() as session:
        parts = [*store.parts(session, job_id, "scan"), *store.parts(session, job_id, "visit")]
        assert len({part.worker for part in parts}) >= 2, "others helped"
        assert {part.status for part in parts} == {"done"}
        assert registry.harvests_of(session, tuple(session.scalars(sa.select(SAE.id)))) != []


def test_the_benchmark_of_workers_harvests_what_it_was_asked_for_and_shares_it_out(home: Home, crew: Crew) -> None:
    trained(home, crew)
    first = harvested(home)
    assert home.wait(first, seconds=200) == "done", home.error(first)
    crew.end()
    tokens = LONG.tokens // 2
    seconds = harvest_workers.measured(home.settings, tokens, 1, (1, 2))
    assert list(seconds) == [1, 2]
    assert min(seconds.values()) > 0
    with home.db.read() as session:
        (found,) = session.scalars(sa.select(Harvest).where(Harvest.status == "published"))
        assert found.job_id != first
        assert 0 < found.n_tokens <= tokens
        parts = [*store.parts(session, found.job_id, "scan"), *store.parts(session, found.job_id, "visit")]
    assert len(parts) >= 4
    assert {part.status for part in parts} == {"done"}


def test_jobs_queued_by_an_older_version_are_done_by_the_new_one(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import jobs

    monkeypatch.setattr(jobs, "VERSION", "2")
    job_id = home.jobs.enqueue_train(QUICK, name="old")
    monkeypatch.undo()
    with working(home):
        assert home.wait(job_id) == "done", home.error(job_id)


def test_an_urgent_job_overtakes_those_that_wait_and_one_for_another_device_stays(home: Home) -> None:
    usual = [home.jobs.enqueue_train(QUICK, name=name) for name in ("one", "two")]
    urgent = Jobs(home.settings, home.db, Wishes(priority=1)).enqueue_train(QUICK, name="urgent")
    elsewhere = Jobs(home.settings, home.db, Wishes(only_on="cuda", priority=1)).enqueue_train(QUICK, name="elsewhere")
    with working(home):
        for job_id in (*usual, urgent):
            assert home.wait(job_id) == "done", home.error(job_id)
    finished = {job_id: home.jobs.get(job_id).finished_at for job_id in (*usual, urgent)}
    assert min(finished, key=lambda job_id: str(finished[job_id])) == urgent
    assert home.status(elsewhere) == "queued"
