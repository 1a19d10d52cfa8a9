"""A worker inside the test's process: queue, cancel, retry, failures, slots."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from sae_core.config import CorpusSource, HarvestJob, ModelSource, SAEConfig, Site
from sae_core.errors import Fenced, LayerOutOfRange, NotFound, SlotTaken, UnknownCorpus, UnknownModel, UsageError
from sae_core.progress import Progress
from server.jobs import VERSION, Jobs, harvest_id, sae_name
from server.settings import Settings
from server.slots import Slot
from server.store import jobs as store
from server.store import registry
from server.tables import SAE, Job
from server.work import training
from server.work.failures import Leave
from server.work.run import Run
from server.worker import Worker
from tests.jobs.conftest import Home, start, tiny_config, wait_for
from tests.test_webhook import listening

QUICK = tiny_config(harvests=())
LONG = tiny_config(tokens=32_768, passes=50, harvests=())


@contextmanager
def working(home: Home) -> Iterator[Worker]:
    """A worker that takes jobs."""
    worker = Worker(home.settings, home.db)
    start(worker)
    try:
        yield worker
    finally:
        worker.close()


def log_of(home: Home, job_id: str) -> list[str]:
    with home.db.read() as session:
        return [line.text for line in store.log_lines(session, job_id)]


# ---- the queue ----


def steps_of(home: Home, job_id: str) -> list[str]:
    """The durable steps of the job, by whose names it is gone on with: where they change, so must `jobs.VERSION`."""
    return [step["function_name"] for step in home.jobs.client.list_workflow_steps(job_id)]


def test_a_queued_job_is_trained_evaluated_and_published(home: Home) -> None:
    job_id = home.jobs.enqueue_train(QUICK, name="Mine")
    assert (job_id, home.status(job_id)) == ("train-mine-1", "queued")
    with working(home):
        assert home.wait(job_id) == "done", home.error(job_id)
    job = home.jobs.get(job_id)
    assert (job.seconds_left, job.done, job.error) == (None, job.total, None)
    with home.db.read() as session:
        sae = registry.sae(session, "mine")
        points = store.points(session, job_id)
        model = registry.model(session, "tiny")
    assert (sae.job_id, sae.folder, sae.config.d_sae) == (job_id, "saes/mine", 128)
    assert {"loss", "fvu", "l0", "dead", "rate"} <= set(points[-1][1])
    assert points[-1][1]["loss"] < points[0][1]["loss"]
    assert (model.n_layers, model.n_heads) == (4, 4)
    assert "Training." in log_of(home, job_id)
    assert "Evaluating on held-out rows and on repeated random tokens." in log_of(home, job_id)
    assert not home.folder(job_id).exists(), "its working files are given back"
    assert (VERSION, steps_of(home, job_id)) == ("3", ["train", "evaluate", "publish", "follow"])


def test_the_same_config_twice_makes_two_saes_with_two_names(home: Home) -> None:
    ids = [home.jobs.enqueue_train(QUICK, name="x") for _ in range(2)]
    assert ids == ["train-x-1", "train-x-2"]
    assert [sae_name(job_id) for job_id in ids] == ["x", "x-2"]


def test_a_duplicate_harvest_is_one_job(home: Home) -> None:
    train_id = home.jobs.enqueue_train(QUICK, name="x")
    with working(home):
        assert home.wait(train_id) == "done", home.error(train_id)
    job = HarvestJob(saes=("x",), corpus="words", rows=QUICK.rows)
    ids = {home.jobs.enqueue_harvest(job) for _ in range(3)}
    assert ids == {f"harvest-x-{job.hash()}"}
    assert [record.kind for record in home.jobs.list()].count("harvest") == 1
    assert len(home.jobs.client.list_workflows(workflow_id_prefix="harvest-")) == 1


def test_a_harvest_is_the_same_job_however_its_saes_are_listed_or_were_stored_once() -> None:
    rows = QUICK.rows.model_dump(mode="json")
    old = HarvestJob.model_validate({"sae": "x", "corpus": "words", "rows": rows})
    assert harvest_id(old) == harvest_id(HarvestJob(saes=("x",), corpus="words", rows=QUICK.rows)) == f"harvest-x-{old.hash()}"
    many = [HarvestJob(saes=saes, corpus="words") for saes in (("b", "a"), ("a", "b", "a"))]
    assert {harvest_id(job) for job in many} == {f"harvest-2-saes-{many[0].hash()}"}
    with pytest.raises(ValidationError, match="at least 1 item"):
        HarvestJob(saes=(), corpus="words")


def test_saes_of_two_models_are_not_harvested_together(home: Home) -> None:
    with home.db.write() as session:
        registry.add_model(session, "other", ModelSource(location="other"))
        session.flush()
        for name, model in (("a", "tiny"), ("b", "other")):
            values = {"layer": 0, "hook": "h", "arch": "topk", "d_in": 64, "d_sae": 64, "k": 8, "n_heads": 4}
            config = SAEConfig(
                arch="topk", d_in=64, d_sae=64, k=8, n_heads=4, d_head=16, site=Site(layer=0), model=model, model_fingerprint="x",
                processing={}, scale=1.0, max_norm=None, context=32,
            )  # fmt: skip
            row = SAE(
                name=name,
                model_id=registry.model(session, model).id,
                config=config.model_dump(mode="json"),
                folder=name,
                sha256="0",
                **values,
            )
            session.add(row)
    with pytest.raises(UsageError, match="a and b read different models"):
        home.jobs.enqueue_harvest(HarvestJob(saes=("a", "b"), corpus="words"))
    assert home.jobs.list() == []


def test_a_job_that_only_reached_our_book_is_given_to_the_queue_by_the_next_worker(home: Home) -> None:
    job_id = "train-left-1"
    with home.db.write() as session:  # as after a crash between our row and the queue's
        store.create(session, job_id, "train", "Train left", QUICK.model_dump(mode="json"))
    with working(home):
        assert home.wait(job_id) == "done", home.error(job_id)


def test_names_and_layers_that_are_not_there_are_refused_before_anything_is_queued(home: Home) -> None:
    with home.db.write() as session:
        row = registry.model(session, "tiny")
        assert row.n_layers is None
    with pytest.raises(UnknownModel, match="registered: tiny"):
        home.jobs.enqueue_train(QUICK.model_copy(update={"model": "nix"}))
    with pytest.raises(UnknownCorpus, match="registered: words"):
        home.jobs.enqueue_train(QUICK.model_copy(update={"corpus": "nix"}))
    with pytest.raises(NotFound, match="no SAE nix"):
        home.jobs.enqueue_harvest(HarvestJob(saes=("nix",), corpus="words"))
    assert home.jobs.list() == []


# ---- cancel and retry ----


def test_a_queued_job_is_cancelled_and_never_runs(home: Home) -> None:
    job_id, other = home.jobs.enqueue_train(QUICK), home.jobs.enqueue_train(QUICK)
    assert home.jobs.cancel(job_id).status == "cancelled"
    with working(home):
        assert home.wait(other) == "done"
    assert (home.status(job_id), home.jobs.get(job_id).attempt) == ("cancelled", 0)


def test_a_running_job_is_cancelled_at_its_next_batch_and_can_be_run_again(home: Home) -> None:
    job_id = home.jobs.enqueue_train(LONG)
    with working(home) as worker:
        wait_for(lambda: any((home.folder(job_id) / "runs/000/checkpoints").glob("step-*")))
        home.jobs.cancel(job_id)
        assert home.status(job_id) == "cancelled"
        wait_for(lambda: not worker.busy, 20)
        steps = sorted((home.folder(job_id) / "runs/000/checkpoints").glob("step-*"))
        assert steps, "what was done is kept"
        assert home.jobs.retry(job_id).status == "queued"
        home.wait(job_id, "running")
        wait_for(lambda: sorted((home.folder(job_id) / "runs/000/checkpoints").glob("step-*"))[-1] > steps[-1])
        home.jobs.cancel(job_id)
        wait_for(lambda: not worker.busy, 20)
    with home.db.read() as session:
        assert "Queued again." in log_of(home, job_id)
        assert registry.sae_names(session) == set()


def test_a_failed_job_says_why_and_runs_again_when_the_cause_is_gone(home: Home, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.write_text("")
    with home.db.write() as session:
        registry.add_corpus(session, "empty", CorpusSource(location=str(text)))
    job_id = home.jobs.enqueue_train(QUICK.model_copy(update={"corpus": "empty"}))
    with working(home):
        assert home.wait(job_id) == "failed"
        assert "text" in (home.error(job_id) or "")
        assert "Traceback" not in (home.error(job_id) or "")
        text.write_text(
            "\n\n".join(["the cat sat on the mat and then it ran home fast"] * 3000 + [f"{n} cats" for n in range(20000)])
        )
        home.jobs.retry(job_id)
        assert home.wait(job_id) == "done", home.error(job_id)


def test_a_layer_that_the_model_lacks_fails_with_its_sentence(home: Home) -> None:
    job_id = home.jobs.enqueue_train(QUICK.model_copy(update={"site": Site(layer=9)}))
    with working(home):
        assert home.wait(job_id) == "failed"
    assert "no layer 9" in (home.error(job_id) or "")
    with pytest.raises(LayerOutOfRange, match="layers 0 to 3"):  # known now, so the next one is refused at once
        home.jobs.enqueue_train(QUICK.model_copy(update={"site": Site(layer=9)}))


def test_an_unforeseen_error_is_a_sentence_for_people_and_a_traceback_in_the_log(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no reason at all")

    monkeypatch.setattr(training, "_train", broken)
    job_id = home.jobs.enqueue_train(QUICK)
    with working(home) as worker:
        assert home.wait(job_id) == "failed"
        log = worker.log_path.read_text()
    cause = "ZeroDivisionError: no reason at all"
    assert (
        home.error(job_id) == f"It stopped with an error that is not foreseen ({cause}); see the worker's log, {worker.log_path}."
    )
    assert "Traceback" in log
    assert "no reason at all" in log


def test_a_full_disk_is_said_to_be_full(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "_train", full)
    job_id = home.jobs.enqueue_train(QUICK)
    with working(home):
        assert home.wait(job_id) == "failed"
    assert home.error(job_id) == f"No room is left in {home.settings.data}; free some space there, then run the job again."


def test_a_failed_step_does_not_stop_the_next_job(home: Home) -> None:
    bad = home.jobs.enqueue_train(QUICK.model_copy(update={"site": Site(layer=9)}))
    good = home.jobs.enqueue_train(QUICK)
    with working(home):
        assert home.wait(good) == "done"
    assert home.status(bad) == "failed"


# ---- fencing ----


def test_a_worker_that_lost_its_job_stops_without_a_trace(home: Home) -> None:
    job_id = home.jobs.enqueue_train(LONG)
    with working(home) as worker:
        wait_for(lambda: any((home.folder(job_id) / "runs/000/checkpoints").glob("step-*")))
        with home.db.write() as session:  # another worker takes the job up
            taken = store.start_attempt(session, job_id, "other")
        wait_for(lambda: not worker.busy, 20)
    record = home.jobs.get(job_id)
    assert (record.status, record.worker, record.attempt, record.error) == ("running", "other", taken, None)


def test_all_writes_of_a_run_are_fenced(home: Home) -> None:
    job_id = home.jobs.enqueue_train(QUICK)
    worker = Worker(home.settings, home.db)
    with home.db.write() as session:
        old = store.start_attempt(session, job_id, "w")
        store.start_attempt(session, job_id, "other")
    run = Run(worker, home.jobs.get(job_id), old)
    reports = [lambda: run.say("late"), lambda: run.report(Progress("train", 1, 2)), run.finish, lambda: run.write().__enter__()]
    for write in reports:
        with pytest.raises(Fenced):
            write()
    with pytest.raises(Leave):
        run.fail(ValueError("late"))
    assert home.status(job_id) == "running"
    worker.slot.free()


# ---- slots ----


def test_what_a_job_has_worked_is_the_time_that_passed_however_often_the_room_is_looked_at(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.work.run.WATCH_SECONDS", 0.0)
    job_id = home.jobs.enqueue_train(QUICK)
    worker = Worker(home.settings.model_copy(update={"beat_seconds": 0.01}), home.db)
    with home.db.write() as session:
        attempt = store.start_attempt(session, job_id, "w")
    job, begun = home.jobs.get(job_id), time.monotonic()
    run = Run(worker, job, attempt)
    for _ in range(3):
        time.sleep(0.1)
        run.check()
        run.look()
    assert 0.3 <= home.jobs.get(job_id).worked <= time.monotonic() - begun
    worker.slot.free()


def test_two_workers_take_two_slots_and_a_freed_one_is_taken_again(settings: Settings) -> None:
    first, second = Slot.take(settings), Slot.take(settings)
    assert (first.name, second.name) == ("worker-0", "worker-1")
    first.free()
    third = Slot.take(settings)
    assert third.name == "worker-0"
    for slot in (second, third):
        slot.free()


def test_a_named_slot_is_not_shared(settings: Settings) -> None:
    named = settings.model_copy(update={"worker_id": "gpu1"})
    named.model_fields_set.add("worker_id")
    held = Slot.take(named)
    with pytest.raises(SlotTaken, match="gpu1"):
        Slot.take(named)
    held.free()


def test_a_model_whose_weights_changed_is_refused_where_saes_rest_on_it(home: Home, tmp_path: Path) -> None:
    from tests.core.tiny_models import save_tiny

    train_id = home.jobs.enqueue_train(QUICK)
    folder = save_tiny("llama", tmp_path / "changing", seed=1)
    with home.db.write() as session:
        registry.add_model(session, "changing", ModelSource(location=str(folder)))
    second = home.jobs.enqueue_train(QUICK.model_copy(update={"model": "changing"}))
    with working(home):
        assert home.wait(second) == "done", home.error(second)
    save_tiny("llama", folder, seed=2)
    third = home.jobs.enqueue_train(QUICK.model_copy(update={"model": "changing"}))
    with working(home):
        assert home.wait(third) == "failed"
    assert "have changed since its SAEs were trained" in (home.error(third) or "")
    assert home.status(train_id) == "done"


def test_the_heart_beats_while_a_worker_lives(home: Home) -> None:
    home.settings = home.settings.model_copy(update={"beat_seconds": 0.05})
    with working(home):
        with home.db.read() as session:
            first = store.workers(session)[0].last_seen

        def later() -> bool:
            with home.db.read() as session:
                return store.workers(session)[0].last_seen > first

        wait_for(later, 10)
        assert Jobs(home.settings, home.db).worker_alive()
    assert not Jobs(home.settings, home.db).worker_alive()
    assert threading.active_count() < 50


# ---- the webhook ----


def test_the_worker_tells_the_webhook_how_a_job_ended_and_an_address_that_is_not_there_spoils_none(home: Home) -> None:
    done, failed = (home.jobs.enqueue_train(QUICK, name=name) for name in ("told", "untold"))
    with home.db.write() as session:
        row = session.get_one(Job, failed)
        row.config = {**row.config, "corpus": "gone"}
    with listening(200, 200) as (address, heard):
        home.settings = home.settings.model_copy(update={"webhook": address})
        with working(home):
            assert home.wait(done) == "done", home.error(done)
            assert home.wait(failed) == "failed"
    assert {said["id"]: said["status"] for _, said in heard} == {done: "done", failed: "failed"}
    home.settings = home.settings.model_copy(update={"webhook": "http://127.0.0.1:9/"})
    alone = home.jobs.enqueue_train(QUICK, name="alone")
    with working(home):
        assert home.wait(alone) == "done", home.error(alone)
