"""Training: of one SAE, and of the many of a sweep on one stream of activations."""

import shutil
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sae_core.config import HarvestJob, SweepConfig, TrainConfig
from sae_core.corpus import Rows
from sae_core.evaluate import evaluate
from sae_core.lens import Lens, load_lens
from sae_core.parallel import train_parallel
from sae_core.progress import Progress, relayed
from sae_core.saes import SAE, load_sae
from sae_core.train import curve_of, diverged, made_by, train_many
from server import doctor, estimates, jobs
from server.estimates import Shape
from server.keeping import room
from server.store import jobs as store
from server.store import registry
from server.store.sweeps import run_names
from server.work.opening import caches, open_activations, open_lens, open_rows
from server.work.publishing import publish_sae
from server.work.run import Run

NOT_TOLD = ("lr", "k")  # of a curve on disk, which follow from the config: a point is the same whoever wrote it


def train_job(run: Run) -> None:
    """A training run, from text to an SAE in the store and its harvests in the queue."""
    cfg, name = TrainConfig.model_validate(run.job.config), jobs.sae_name(run.id)

    run.step("train", lambda: _train(run, cfg))
    metrics = run.step("evaluate", lambda: _evaluate(run, cfg))
    run.step("publish", lambda: publish_sae(run, cfg.model, name, metrics))
    run.step("follow", lambda: _follow(run, [(cfg, name)]))


def _train(run: Run, cfg: TrainConfig) -> None:
    lens = open_lens(run, cfg.model)
    lens.check_layer(cfg.site.layer)
    run.clock = estimates.Clock(estimates.train_seconds(cfg, Shape.of(lens.info), run.worker.speed))
    need = doctor.needs(cfg, Shape.of(lens.info), run.worker.speed).disk
    room.need_room(run.worker.settings, need - room.size_of(run.folder))
    rows = open_rows(run, lens, cfg.corpus, cfg)
    _train_all(run, [cfg], lens, rows)


def _evaluate(run: Run, cfg: TrainConfig, index: int = 0, nth: int = 0, of: int = 1) -> dict[str, Any]:
    lens = open_lens(run, cfg.model)
    expected = estimates.train_seconds(cfg, Shape.of(lens.info), run.worker.speed)
    if not run.clock.expected:
        run.clock = estimates.Clock({name: of * expected[name] for name in ("evaluate", "harvests")})
    rows = open_rows(run, lens, cfg.corpus, cfg)
    sae = load_sae(made_by(run.folder, index), lens.device)
    reports = evaluate(lens, sae, rows, open_activations(run, run.folder, lens, rows, cfg))

    def one_of_many(report: Progress) -> Progress:
        return replace(report, done=nth * report.total + report.done, total=of * report.total)

    return run.follow(relayed(reports, one_of_many)).model_dump(mode="json")


def _follow(run: Run, made: Sequence[tuple[TrainConfig, str]]) -> None:
    """Queue the harvests that the configs ask for; SAEs of which the nth is to be the same are swept together."""
    for nth in range(max((len(cfg.harvests) for cfg, _ in made), default=0)):
        alike: dict[tuple[str, str, str], list[tuple[TrainConfig, str]]] = {}
        for cfg, name in made:
            if nth < len(cfg.harvests):
                alike.setdefault((cfg.corpus, cfg.rows.hash(), cfg.harvests[nth].hash()), []).append((cfg, name))
        for members in alike.values():
            first = members[0][0]
            config = first.harvests[nth]
            job = HarvestJob(saes=tuple(name for _, name in members), corpus=first.corpus, rows=first.rows, harvest=config)
            model = run.worker.model_shape(first.model)
            swept = [estimates.Swept(cfg.site.layer, cfg.expansion * model.d_in, cfg.k) for cfg, _ in members] if model else []
            seconds = estimates.harvest_seconds(config, swept, first.rows, model, run.worker.speed, cached=True) if model else {}
            run.worker.jobs.enqueue_harvest(job, parent=run.id, seconds_left=sum(seconds.values()) or None)
    for checkpoints in run.folder.glob("runs/*/checkpoints"):
        shutil.rmtree(checkpoints, ignore_errors=True)


def sweep_job(run: Run) -> None:
    """Many training runs on one stream of activations: all are trained, then each is evaluated and published."""
    cfg = SweepConfig.model_validate(run.job.config)
    trained = run.step("train", lambda: _train_sweep(run, cfg))
    runs = cfg.runs(trained["n_layers"])
    made = [
        (index, one, name)
        for index, (one, name) in enumerate(zip(runs, run_names(run.id, cfg, runs), strict=True))
        if index not in trained["diverged"]
    ]
    for nth, (index, one, name) in enumerate(made):
        metrics = run.step(f"evaluate {index}", partial(_evaluate, run, one, index, nth, len(made)))
        run.step(f"publish {index}", partial(publish_sae, run, one.model, name, metrics, index))
    run.step("follow", lambda: _follow(run, [(one, name) for _, one, name in made]))
    shutil.rmtree(run.folder / "runs", ignore_errors=True)


def _train_sweep(run: Run, cfg: SweepConfig) -> dict[str, Any]:
    """Train every run; how many layers the model has, which says what the runs are, and which of them diverged."""
    lens = open_lens(run, cfg.base.model)
    runs, shape, speed = cfg.runs(lens.info.n_layers), Shape.of(lens.info), run.worker.speed
    for one in runs:
        lens.check_layer(one.site.layer)
        one.check_width(lens.info.d_in)
    run.clock = estimates.Clock(estimates.sweep_seconds(runs, shape, speed))
    need = doctor.sweep_needs(runs, shape, speed).disk
    room.need_room(run.worker.settings, need - room.size_of(run.folder))
    rows = open_rows(run, lens, cfg.base.corpus, cfg.base)
    run.say(f"{len(runs)} SAEs are trained on one stream of activations.")
    _train_all(run, runs, lens, rows)
    lost = [index for index in range(len(runs)) if diverged(run.folder, index)]
    return {"n_layers": lens.info.n_layers, "diverged": lost}


def _train_all(run: Run, cfgs: Sequence[TrainConfig], lens: Lens, rows: Rows) -> None:
    """Train, then see that the curves in the database are whole: a kill loses what was not written yet."""
    run.follow(_training(run, cfgs, lens, rows))
    for index in range(len(cfgs)):
        with run.write() as session:
            known = {step for step, _ in store.points(session, run.id, run=index)}
            curve = [
                (step, {of: value for of, value in values.items() if of not in NOT_TOLD})
                for step, values in curve_of(run.folder, index)
            ]
            missing = [(step, values) for step, values in curve if step not in known]
            store.add_points(session, run.id, run.attempt, missing, run=index)


def _training(run: Run, cfgs: Sequence[TrainConfig], lens: Lens, rows: Rows) -> Generator[Progress, None, list[SAE]]:
    """The SAEs' training, here or in as many processes as the settings say."""
    settings, name = run.worker.settings, cfgs[0].model
    if settings.processes == 1:
        return train_many(cfgs, lens, rows, run.folder, caches(settings.data))
    with run.worker.db.read() as session:
        source = registry.model(session, name).source
    return train_parallel(
        cfgs,
        partial(load_lens, source, name=name, cache=settings.cache),
        partial(Rows.open, rows.folder),
        run.folder,
        caches(settings.data),
        processes=settings.processes,
        device=str(lens.device),
    )
