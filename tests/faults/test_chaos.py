"""Workers killed, stopped for longer than they may be silent, and started again at random: everything appears exactly once."""

import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from server.jobs import sae_name
from server.store import jobs as store
from server.tables import SAE, Feature, FeatureHead, Harvest, Job, JobPoint
from tests.faults.conftest import SILENT, Crew, home_of, quick, until
from tests.jobs.conftest import HARVEST, Home, tiny_config
from tests.jobs.test_crashes import published

SEED = int(os.environ.get("HEADSCOPE_CHAOS_SEED", "7"))
SECONDS = float(os.environ.get("HEADSCOPE_CHAOS_SECONDS", "25"))
WORKERS = 3
NAMES = ("a", "b")
TRAINING = tiny_config(tokens=8192, passes=2, harvests=(HARVEST.model_copy(update={"tokens": 4096, "shard_rows": 16}),))


def load(home: Home) -> list[str]:
    """What is to be done: trainings, and harvests that follow from them."""
    cfgs = [TRAINING.model_copy(update={"seed": seed}) for seed in range(len(NAMES))]
    return [home.jobs.enqueue_train(cfg, name=name) for cfg, name in zip(cfgs, NAMES, strict=True)]


def all_done(home: Home) -> bool:
    """Whether nothing is left to do; a failure ends the waiting too."""
    with home.db.read() as session:
        jobs = store.newest(session, 500)
        assert [job.error for job in jobs if job.status == store.FAILED] == []
        return sum(job.kind == "harvest" for job in jobs) == len(NAMES) and all(job.ended for job in jobs)


def end_state(home: Home) -> dict[str, Any]:
    """All that must not depend on what happened on the way: files, rows, and how many there are of each."""
    with home.db.read() as session:
        curves = sa.select(JobPoint.job_id, JobPoint.step, JobPoint.values).order_by(JobPoint.job_id, JobPoint.step)
        points = [
            (job, step, {name: value for name, value in values.items() if name != "rate"})
            for job, step, values in session.execute(curves)
            if not job.startswith("harvest")
        ]
        counts = {
            table.__tablename__: session.scalar(sa.select(sa.func.count()).select_from(table))
            for table in (SAE, Harvest, Feature, FeatureHead)
        }
        kept = [job for job in store.newest(session, 500) if job.kind != store.PARTS]
    saes = home.settings.data / "saes"
    return {
        "weights": {p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(saes.glob("*/sae.safetensors"))},
        "examples": sorted(published(home.db), key=repr),  # of two SAEs
        "points": points,
        "counts": counts,
        "jobs": sorted((job.id, job.status) for job in kept),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_text: Path) -> Iterator[dict[str, Any]]:
    """What one worker makes of it that nothing happens to."""
    home, crew = home_of(quick(tmp_path_factory.mktemp("undisturbed")), tiny_folder, tiny_text), Crew()
    load(home)
    crew.start(home.settings)
    until(lambda: all_done(home))
    crew.end()
    yield end_state(home)
    home.jobs.close()
    home.db.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request: pytest.FixtureRequest, tmp_path: Path, tiny_folder: Path, tiny_text: Path) -> Iterator[Home]:
    """A data folder on either database."""
    url = request.getfixturevalue("new_database") if request.param == "postgresql" else None
    made = home_of(quick(tmp_path, url), tiny_folder, tiny_text)
    yield made
    made.jobs.close()
    made.db.close()


def disturb(crew: Crew, home: Home, draw: random.Random) -> dict[str, int]:
    """Until the time is over or everything is done: every second or so, one worker is killed, stopped or asked to leave."""
    done = dict.fromkeys(("killed", "stopped", "asked"), 0)
    alive = [crew.start(home.settings) for _ in range(WORKERS)]
    asleep: list[tuple[float, Any]] = []
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and not all_done(home):
        time.sleep(draw.uniform(0.3, 1.2))
        for wakes, process in list(asleep):
            if time.monotonic() >= wakes:
                crew.send(process, signal.SIGCONT)
                asleep.remove((wakes, process))
                alive.append(process)
        if len(alive) + len(asleep) < WORKERS:
            alive.append(crew.start(home.settings))
        elif alive:
            chosen, what = alive.pop(draw.randrange(len(alive))), draw.choice(list(done))
            done[what] += 1
            if what == "stopped":
                crew.send(chosen, signal.SIGSTOP)
                asleep.append((time.monotonic() + SILENT * draw.uniform(1.0, 2.5), chosen))
            else:
                crew.send(chosen, signal.SIGKILL if what == "killed" else signal.SIGTERM)
    for _, process in asleep:
        crew.send(process, signal.SIGCONT)
    crew.start(home.settings)
    return done


@pytest.mark.timeout(600)
def test_whatever_happens_to_workers_everything_appears_exactly_once(home: Home, crew: Crew, undisturbed: dict[str, Any]) -> None:
    ids = load(home)
    happened = disturb(crew, home, random.Random(SEED))
    until(lambda: all_done(home), 420)
    assert sum(happened.values()) >= 5, f"too little happened: {happened}"
    found = end_state(home)
    assert found["jobs"] == undisturbed["jobs"]
    assert found["counts"] == undisturbed["counts"]
    assert found["weights"] == undisturbed["weights"]
    assert found["points"] == undisturbed["points"]
    assert found["examples"] == undisturbed["examples"]
    with home.db.read() as session:
        attempts = session.execute(sa.select(Job.id, Job.attempt)).all()
    assert max(attempt for _, attempt in attempts) > 1, "nothing was taken over"
    assert {sae_name(job_id) for job_id in ids} == set(found["weights"])
