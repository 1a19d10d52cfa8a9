"""A harvest, step after step, and how the workers that are there share its scan and its visit."""

import time
from contextlib import suppress
from functools import partial

import numpy as np

from sae_core.config import HarvestJob
from sae_core.errors import Cancelled, Fenced, HeadscopeError
from server.job_folders import left_by
from server.store import jobs as store
from server.work.harvest_steps import Hands
from server.work.run import Run

PART_SECONDS = 0.3  # between two looks whether others have done their parts
SEEN_SECONDS = 20.0  # since a worker's last heartbeat, for it to be asked for help


def harvest_job(run: Run) -> None:
    """One sweep, from rows to published harvests. What each step needs is read from disk again if the worker is new."""
    cfg = HarvestJob.model_validate(run.job.config)
    hand = Hands(run, cfg)

    # ---- sweep and choose: every row once, for all SAEs ----
    run.step("scan", lambda: _share_out(run, hand, "scan"))
    for index in range(len(cfg.saes)):
        run.step(f"choose {index}", partial(hand.choose, index))

    # ---- visit: every row chosen once, for all SAEs ----
    run.step("visit", lambda: _share_out(run, hand, "visit"))
    parts = hand.visits

    # ---- describe, write and publish: SAE after SAE ----
    for index in range(len(cfg.saes)):
        run.step(f"features {index}", partial(hand.features, index, len(parts)))
        harvest_id = run.step(f"begin {index}", partial(hand.begin, index))
        run.step(f"write features {index}", partial(hand.write_features, index, harvest_id, len(parts)))
        run.step(f"write heads {index}", partial(hand.write_heads, index, harvest_id))
        for number in range(len(parts)):
            run.step(f"write {index} {number}", partial(hand.write_part, index, harvest_id, number, len(parts)))
        run.step(f"search {index}", partial(hand.search, harvest_id))
        run.step(f"publish {index}", partial(hand.publish, index, harvest_id, len(parts)))


PARTS_EACH = 2
"""Parts of a phase for each worker: whoever is quicker takes more."""


def _share_out(run: Run, hand: Hands, phase: str) -> None:
    """Do a phase of a harvest, shard by shard, with all workers on this kind of device that are there. Each part is a job of its
    own, which writes into its own folder; whoever has the whole takes parts as well, and moves into its folder what others have
    made. What is there is not made again, so it does not matter who was killed when."""
    numbers = [number for number in range(hand.count(phase)) if not hand.there(phase, number)]
    with run.write() as session:
        alive = [
            one for one in store.workers(session, seen_within=SEEN_SECONDS) if one.device.partition(":")[0] == run.worker.kind
        ]
        cut = store.parts(session, run.id, phase)
        if not cut and len(alive) > 1 and len(numbers) > 1:
            n = min(len(numbers), PARTS_EACH * len(alive))
            configs = [
                {"phase": phase, "number": i, "shards": [int(at) for at in share], "saes": list(hand.cfg.saes)}
                for i, share in enumerate(np.array_split(numbers, n))
            ]
            store.add_parts(session, run.id, run.attempt, phase, configs, run.worker.kind)
        elif cut:
            store.add_parts(session, run.id, run.attempt, phase, [], run.worker.kind)
    run.worker.jobs.release()
    while _take_part(run, hand, phase):
        pass
    for number in numbers:  # whose files are lost, or which were never cut
        if not hand.there(phase, number):
            hand.do(phase, number)


def _take_part(run: Run, hand: Hands, phase: str) -> bool:
    """Do a part, or wait a while for those who do; False when nothing is left to wait for."""
    run.check()
    with run.worker.db.read() as session:
        parts = store.parts(session, run.id, phase)
    for part in parts:
        if part.status == store.FAILED:
            raise HeadscopeError(part.error or f"A part of it, {part.id}, failed.")
        if part.status == store.DONE:
            hand.gather(part.id)
    if all(part.ended for part in parts):
        return False
    with run.write() as session:
        taken = store.take_part(session, run.id, phase, run.worker.slot.name)
    if taken is None:
        run.report(hand.so_far(phase))
        time.sleep(PART_SECONDS)
        return True
    part, attempt = taken
    for number in part.config["shards"]:
        if not hand.there(phase, number):
            hand.do(phase, number)
    with run.worker.db.write() as session, suppress(Cancelled, Fenced):
        store.finish(session, part.id, attempt)
    return True


def shard_job(run: Run) -> None:
    """A part of another worker's harvest, into a folder of its own."""
    whole = run.job.parent_id or ""
    with run.worker.db.read() as session:
        asked = store.get(session, whole)
    if asked.ended:
        return
    cfg = HarvestJob.model_validate(asked.config)
    run.step("part", lambda: _do_part(run, cfg, whole))


def _do_part(run: Run, cfg: HarvestJob, whole: str) -> None:
    phase, data = run.job.config["phase"], run.worker.settings.data
    while True:
        hand = Hands(run, cfg, whole)
        try:
            for number in run.job.config["shards"]:
                if not hand.there(phase, number):
                    hand.do(phase, number)
        except OSError:
            if left_by(data, whole) == hand.source:
                raise
            continue  # another worker has taken the whole up, and moved what we read of it
        return
