"""The job book: who may write, in which order jobs start, what a late worker cannot do."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy.orm import Session

from sae_core.errors import Cancelled, Fenced, JobError, UnknownJob
from sae_core.progress import Progress
from server import jobs
from server.db import Database
from server.settings import Settings
from server.store import jobs as store
from server.tables import Worker, now
from tests.upgraded import upgraded

HALF = Progress("train", 50, 100, rate=10.0)


@pytest.fixture
def db(settings: Settings) -> Database:
    made = upgraded(settings, queue=False)
    with made.write() as session:
        store.create(session, "train-x-1", "train", "Train x", {"model": "tiny"})
    return made


def attempt(db: Database, worker: str = "w") -> int:
    with db.write() as session:
        return store.start_attempt(session, "train-x-1", worker)


LATE: dict[str, Callable[[Session, int], object]] = {
    "progress": lambda s, a: store.report(s, "train-x-1", a, HALF, 5.0),
    "points": lambda s, a: store.add_points(s, "train-x-1", a, [(3, {"loss": 9.0})]),
    "line": lambda s, a: store.say(s, "train-x-1", a, "I am late"),
    "end": lambda s, a: store.finish(s, "train-x-1", a),
    "failure": lambda s, a: store.fail(s, "train-x-1", a, "wrong"),
}


@pytest.mark.parametrize("write", LATE.values(), ids=LATE)
def test_a_late_write_of_an_old_attempt_is_refused_and_changes_nothing(
    db: Database, write: Callable[[Session, int], object]
) -> None:
    old, _ = attempt(db, "slow"), attempt(db, "quick")

    def everything() -> tuple[object, ...]:
        with db.read() as session:
            record, lines = store.get(session, "train-x-1"), store.log_lines(session, "train-x-1")
            return record, store.points(session, "train-x-1"), lines

    before = everything()
    with pytest.raises(Fenced), db.write() as session:
        write(session, old)
    assert everything() == before


def test_a_fenced_write_takes_the_rest_of_its_transaction_along(db: Database) -> None:
    old, current = attempt(db), attempt(db)

    def both(session: Session) -> None:
        store.say(session, "train-x-1", current, "written in the same transaction")
        store.say(session, "train-x-1", old, "too late")

    with pytest.raises(Fenced), db.write() as session:
        both(session)
    with db.read() as session:
        assert [line.text for line in store.log_lines(session, "train-x-1")] == ["Taken up again by w."]


def test_a_worker_learns_of_a_cancel_at_its_next_look_and_next_write(db: Database) -> None:
    current = attempt(db)
    with db.write() as session:
        assert store.cancel(session, "train-x-1")
    with pytest.raises(Cancelled), db.read() as session:
        store.still_ours(session, "train-x-1", current)
    with pytest.raises(Cancelled), db.write() as session:
        store.report(session, "train-x-1", current, HALF, None)


def test_an_ended_job_is_not_taken_up_and_not_cancelled(db: Database) -> None:
    current = attempt(db)
    with db.write() as session:
        store.finish(session, "train-x-1", current)
    with pytest.raises(Cancelled):
        attempt(db)
    with db.write() as session:
        assert not store.cancel(session, "train-x-1")
        assert store.get(session, "train-x-1").status == "done"


def test_queueing_again_shuts_out_the_attempt_that_failed(db: Database) -> None:
    old = attempt(db)
    with db.write() as session:
        store.fail(session, "train-x-1", old, "No text.")
        store.requeue(session, "train-x-1")
    with db.read() as session:
        record = store.get(session, "train-x-1")
        assert (record.status, record.error) == ("queued", None)
    with pytest.raises(Fenced), db.write() as session:
        store.finish(session, "train-x-1", old)
    assert attempt(db) > old


def test_only_what_failed_or_was_cancelled_is_queued_again(db: Database) -> None:
    with pytest.raises(JobError, match="only a failed or cancelled job"), db.write() as session:
        store.requeue(session, "train-x-1")


def test_creating_an_id_twice_changes_nothing(db: Database) -> None:
    with db.write() as session:
        assert not store.create(session, "train-x-1", "train", "another title", {})
        assert store.get(session, "train-x-1").title == "Train x"


def test_a_resumed_run_replaces_the_points_it_says_again(db: Database) -> None:
    first = attempt(db)
    with db.write() as session:
        store.add_points(session, "train-x-1", first, [(1, {"loss": 3.0}), (2, {"loss": 2.0})])
    second = attempt(db)
    with db.write() as session:
        store.add_points(session, "train-x-1", second, [(2, {"loss": 2.0}), (3, {"loss": 1.0})])
    with db.read() as session:
        assert store.points(session, "train-x-1") == [(1, {"loss": 3.0}), (2, {"loss": 2.0}), (3, {"loss": 1.0})]
        assert store.points(session, "train-x-1", after=2) == [(3, {"loss": 1.0})]
        assert store.last_point(session, "train-x-1") == {"loss": 1.0}


def test_harvests_of_one_training_start_one_after_the_other(db: Database) -> None:
    with db.write() as session:
        for number in (1, 2):
            store.create(session, f"harvest-{number}", "harvest", "", {}, parent_id="train-x-1")
        store.create(session, "harvest-alone", "harvest", "", {})

    def ready() -> list[str]:
        with db.read() as session:
            return [job.id for job in store.ready(session)]

    assert ready() == ["train-x-1", "harvest-1", "harvest-alone"]
    with db.write() as session:
        number = store.start_attempt(session, "harvest-1", "w")
    assert "harvest-2" not in ready()
    with db.write() as session:
        store.fail(session, "harvest-1", number, "broken")
    assert "harvest-2" in ready()


class Ears:
    """A listener of heartbeats whose monotonic clock the test moves."""

    def __init__(self, db: Database) -> None:
        self.db, self.at = db, 100.0
        self.listener = store.Listener(60, 5, monotonic=lambda: self.at)

    def after(self, seconds: float, *beating: str) -> list[str]:
        """Who is silent, `seconds` after the last look and right after these have beaten."""
        self.at += seconds
        with self.db.write() as session:
            for name in beating:
                store.beat(session, name, "cpu", 1)
        with self.db.read() as session:
            return self.listener.look(session)


def test_only_a_silent_worker_is_taken_for_dead(db: Database) -> None:
    ears = Ears(db)
    assert ears.after(0, "alive", "dead") == []
    for _ in range(11):
        assert ears.after(5, "alive") == []
    assert ears.after(5, "alive") == ["dead"]
    assert ears.after(5, "alive", "dead") == []


@pytest.mark.parametrize("jump", [timedelta(days=-2), timedelta(days=2)])
def test_a_clock_that_jumps_makes_nobody_dead_and_hides_nobody(
    db: Database, monkeypatch: pytest.MonkeyPatch, jump: timedelta
) -> None:
    ears = Ears(db)
    ears.after(0, "alive", "dead")
    monkeypatch.setattr(store, "now", lambda: now() + jump)
    for _ in range(11):
        assert ears.after(5, "alive") == []
    assert ears.after(5, "alive") == ["dead"]


def test_who_slept_or_had_no_database_thinks_nobody_dead_for_it(db: Database) -> None:
    ears = Ears(db)
    ears.after(0, "alive")
    assert ears.after(3600) == []
    assert ears.after(5, "alive") == []


def test_a_worker_is_shown_while_it_was_seen_lately(db: Database) -> None:
    with db.write() as session:
        store.beat(session, "alive", "cpu", 1)
        session.add(Worker(id="dead", device="cpu", pid=2, last_seen=now() - timedelta(seconds=61)))
    with db.read() as session:
        assert [worker.id for worker in store.workers(session, seen_within=20)] == ["alive"]


def test_what_is_tried_again_waits_but_not_for_a_clock_that_jumped_back(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    number = attempt(db)
    with db.write() as session:
        store.try_again(session, "train-x-1", number, "The database was away.", 80)
    with pytest.raises(Fenced), db.write() as session:
        store.finish(session, "train-x-1", number)

    def starts(after: timedelta) -> bool:
        monkeypatch.setattr(store, "now", lambda: now() + after)
        with db.read() as session:
            return [job.id for job in store.ready(session)] == ["train-x-1"]

    assert not starts(timedelta(seconds=10))
    assert starts(timedelta(seconds=81))
    assert starts(timedelta(days=-1))


def test_a_silent_workers_jobs_are_queued_and_it_is_shut_out(db: Database) -> None:
    number = attempt(db, "silent")
    with db.write() as session:
        assert store.take_from(session, "silent") == 1
        assert store.take_from(session, "silent") == 0
    with pytest.raises(Fenced), db.read() as session:
        store.still_ours(session, "train-x-1", number)
    with pytest.raises(Fenced), db.write() as session:
        store.finish(session, "train-x-1", number)
    assert attempt(db, "other") == number + 1


def test_a_part_is_done_once_by_whoever_takes_it_first(db: Database) -> None:
    with db.write() as session:
        for name in ("boss", "helper"):
            store.beat(session, name, "cpu", 1)
        number = store.start_attempt(session, "train-x-1", "boss")
        configs = [{"phase": "scan", "number": n} for n in range(2)]
        store.add_parts(session, "train-x-1", number, "scan", configs, "cpu")
        store.add_parts(session, "train-x-1", number, "scan", configs, "cpu")
        assert [part.id for part in store.parts(session, "train-x-1", "scan")] == ["train-x-1-scan-0", "train-x-1-scan-1"]
        taken = store.take_part(session, "train-x-1", "scan", "boss")
        assert taken is not None
        with pytest.raises(Cancelled):
            store.start_attempt(session, taken[0].id, "helper")
        store.start_attempt(session, "train-x-1-scan-1", "helper")
        assert [job.id for job in store.newest(session)] == ["train-x-1"]
    with db.write() as session:
        assert store.take_part(session, "train-x-1", "scan", "boss") == (store.get(session, taken[0].id), 2)
        store.leave(session, "helper")
        store.finish(session, taken[0].id, 2)
    with db.write() as session:
        again = store.take_part(session, "train-x-1", "scan", "boss")
        assert again is not None
        assert again[0].id == "train-x-1-scan-1"
        assert store.cancel(session, "train-x-1")
    with db.read() as session:
        assert [part.status for part in store.parts(session, "train-x-1", "scan")] == ["done", "cancelled"]


def test_an_unknown_job_is_said_to_be_unknown(db: Database) -> None:
    with pytest.raises(UnknownJob, match="no job nix"), db.read() as session:
        store.get(session, "nix")


@pytest.mark.parametrize(
    ("text", "name"),
    [("google/Gemma-2 2b", "gemma-2-2b"), ("../../etc/passwd", "passwd"), ("...", "sae"), ("a/b/", "b"), ("x" * 200, "x" * 60)],
)
def test_names_fit_addresses_folders_and_ids(text: str, name: str) -> None:
    assert jobs.slug(text) == name
