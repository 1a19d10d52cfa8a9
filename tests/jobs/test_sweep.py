"""A sweep from the queue to its table: many SAEs on one stream of activations, each published under its own name."""

import sys
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from safetensors.numpy import load_file

from sae_core.config import HarvestConfig, HarvestJob, Site, SweepConfig
from sae_core.errors import LayerOutOfRange, UnknownCorpus, UsageError
from server.jobs import NAME_LENGTH, harvest_id
from server.store import jobs as store
from server.store import registry
from server.store.harvests import stored_gaps
from server.store.sweeps import run_names, sweep
from server.tables import SAE, Feature, Harvest
from server.work import training
from server.work.run import Run
from tests.jobs.conftest import HARVEST, Home, WorkerProcess, tiny_config, wait_for
from tests.jobs.test_worker import log_of, working
from tests.test_tracking import Package

BASE = tiny_config(tokens=8192, passes=1, harvests=())
SWEEP = SweepConfig(base=BASE, layers=(1, 3), archs=("topk", "batchtopk"), ks=(4, 8))
PAIR = SweepConfig(base=BASE, ks=(4, 8))
NAMES = {f"s-l{layer:02d}-{arch}-k{k}" for layer in (1, 3) for arch in ("topk", "batchtopk") for k in (4, 8)}


def know_the_model(home: Home) -> None:
    """As if a worker had loaded it."""

    class Info:
        fingerprint, n_layers, n_heads, n_kv_heads, d_head, d_model, d_vocab = "x", 4, 4, 2, 16, 64, 100

    with home.db.write() as session:
        registry.note_shape(session, "tiny", Info())


# ---- the whole way ----


def test_every_run_of_a_sweep_becomes_an_sae_of_its_own(home: Home) -> None:
    job_id = home.jobs.enqueue_sweep(SWEEP, name="s")
    assert job_id == "sweep-s-1"
    with working(home):
        assert home.wait(job_id) == "done", home.error(job_id)
    with home.db.read() as session:
        assert registry.sae_names(session) == NAMES
        saes = {name: registry.sae(session, name) for name in NAMES}
        curves = [store.points(session, job_id, run=run) for run in range(8)]
        record = sweep(session, job_id)
    assert {sae.job_id for sae in saes.values()} == {job_id}
    for name, sae in saes.items():
        assert name == f"s-l{sae.config.site.layer:02d}-{sae.config.arch}-k{sae.config.k}"
        assert (home.settings.data / sae.folder / "sae.safetensors").exists()
    assert all(curve[-1][1]["loss"] < curve[0][1]["loss"] for curve in curves)
    assert len({curve[-1][1]["loss"] for curve in curves}) == 8, "each run has a curve of its own"
    assert "8 SAEs are trained on one stream of activations." in log_of(home, job_id)
    assert not home.folder(job_id).exists(), "its working files are given back"
    assert [run.sae for run in record.runs] == run_names(job_id, SWEEP, SWEEP.runs(4))
    assert {run.state for run in record.runs} == {"evaluated"}
    for run in record.runs:
        assert run.fvu is not None
        assert 0 < run.fvu < 1.5
        assert run.rate
        assert "prose ce zero" in run.kept
        if run.arch == "topk":
            assert run.l0 == pytest.approx(run.k, rel=0.01)


def test_an_sae_of_a_sweep_equals_one_that_is_trained_alone(home: Home) -> None:
    sweep_id = home.jobs.enqueue_sweep(PAIR, name="many")
    alone = home.jobs.enqueue_train(BASE.model_copy(update={"k": 4}), name="alone")
    with working(home):
        assert [home.wait(job) for job in (sweep_id, alone)] == ["done", "done"]
    one, other = (load_file(home.settings.data / "saes" / name / "sae.safetensors") for name in ("many-k4", "alone"))
    assert all((one[key] == other[key]).all() for key in one)


def test_harvests_that_agree_follow_as_one_job_for_all_saes_and_each_is_published(home: Home) -> None:
    other = HARVEST.model_copy(update={"top_k": 2})
    cfg = SweepConfig(
        base=BASE.model_copy(update={"harvests": (HARVEST,)}),
        layers=(0, 2),
        archs=("topk", "relu"),
        each={"relu": {"harvests": [other.model_dump()]}},
    )
    job_id = home.jobs.enqueue_sweep(cfg, name="h")
    with working(home):
        assert home.wait(job_id) == "done", home.error(job_id)
        children = {
            harvest_id(HarvestJob(saes=(f"h-l00-{arch}", f"h-l02-{arch}"), corpus="words", rows=BASE.rows, harvest=harvest))
            for arch, harvest in (("topk", HARVEST), ("relu", other))
        }
        for child in children:
            assert home.wait(child) == "done", home.error(child)
        wait_for(lambda: not home.folder(job_id).exists(), 20)
    with home.db.read() as session:
        assert {job.id for job in store.children(session, job_id)} == children
        found = session.execute(
            sa.select(SAE.name, SAE.layer, SAE.harvest_id, Harvest.job_id).join(Harvest, Harvest.id == SAE.harvest_id)
        )
        rows = {row.name: row for row in found}
        assert set(rows) == {f"h-l{layer:02d}-{arch}" for layer in (0, 2) for arch in ("topk", "relu")}
        assert len({row.harvest_id for row in rows.values()}) == 4
        assert {row.job_id for row in rows.values()} == children
        assert rows["h-l00-topk"].job_id == rows["h-l02-topk"].job_id
        counts = [
            session.scalars(sa.select(Feature.n_fired).where(Feature.harvest_id == row.harvest_id).order_by(Feature.idx)).all()
            for row in rows.values()
        ]
        assert len(set(map(tuple, counts))) == 4  # each of its own SAE, at its own layer
        watched = [values for child in children for _, values in store.points(session, child)]
        assert sum(values["firings"] for values in watched) == sum(map(sum, counts))
        assert sum(values["live"] for values in watched) == sum(n > 0 for of_one in counts for n in of_one)
        assert stored_gaps(session, rows["h-l02-relu"].harvest_id).max() < 1e-4


def test_harvests_of_different_saes_do_not_wait_for_each_other_but_those_of_one_do(home: Home) -> None:
    """Two workers may take two SAEs' harvests at once; of one SAE each replaces the former, so in order."""
    with home.db.write() as session:
        store.create(session, "sweep-x-1", "sweep", "x", {})
        for sae in ("a", "b"):
            for n in (1, 2):
                store.create(session, f"harvest-{sae}-{n}", "harvest", "x", {"saes": [sae]}, parent_id="sweep-x-1")
        store.create(session, "harvest-bc", "harvest", "x", {"saes": ["b", "c"]}, parent_id="sweep-x-1")
        store.create(session, "harvest-c", "harvest", "x", {"sae": "c"}, parent_id="sweep-x-1")  # as jobs were stored once
        store.create(session, "harvest-d", "harvest", "x", {"saes": ["d"]}, parent_id="sweep-x-1")
        store.create(session, "harvest-a-3", "harvest", "x", {"saes": ["a"]})  # of nobody's, so it waits for nobody
        ready = {"sweep-x-1", "harvest-a-1", "harvest-b-1", "harvest-d", "harvest-a-3"}
        assert {job.id for job in store.ready(session)} == ready


def test_the_curves_of_every_run_go_to_a_project_where_one_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package()
    monkeypatch.setitem(sys.modules, "wandb", package)
    home.settings = home.settings.model_copy(update={"wandb": "mine"})
    job_id = home.jobs.enqueue_sweep(PAIR, name="s")
    with working(home):
        assert home.wait(job_id) == "done", home.error(job_id)
    assert [(run.how["project"], run.how["id"], run.finished) for run in package.runs] == [
        ("mine", f"{job_id}-000", True),
        ("mine", f"{job_id}-001", True),
    ]
    with home.db.read() as session:
        for index, run in enumerate(package.runs):
            assert run.points == dict(store.points(session, job_id, run=index))


# ---- interruptions ----


LONG = SweepConfig(base=tiny_config(tokens=32_768, passes=20, harvests=()), ks=(4, 8))


def test_a_killed_sweep_is_gone_on_with_and_its_saes_stand_once(home: Home, worker_process: Callable[..., WorkerProcess]) -> None:
    cfg = SweepConfig(base=tiny_config(tokens=32_768, passes=4, harvests=()), ks=(4, 8))
    job_id = home.jobs.enqueue_sweep(cfg, name="s")
    first = worker_process(home.settings)
    wait_for(lambda: any((home.folder(job_id) / "runs" / "001" / "checkpoints").glob("step-*")))
    first.kill()
    assert home.status(job_id) == "running"
    worker_process(home.settings)
    assert home.wait(job_id) == "done", home.error(job_id)
    with home.db.read() as session:
        assert registry.sae_names(session) == {"s-k4", "s-k8"}
        steps = [[step for step, _ in store.points(session, job_id, run=run)] for run in (0, 1)]
    total = 4 * (32_768 * 31 // 32 // 64)
    assert steps[0] == steps[1] == [*range(1, total, 4), total], "curves are whole, whatever was not written when it was killed"


def test_a_sweep_that_fails_while_it_publishes_is_gone_on_with_where_it_was(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = training.publish_sae

    def full(run: Run, cfg: object, name: str, *rest: object) -> None:
        if name == "s-k8":
            raise OSError(28, "No space left on device")
        publish(run, cfg, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "publish_sae", full)
    job_id = home.jobs.enqueue_sweep(PAIR, name="s")
    with working(home):
        assert home.wait(job_id) == "failed"
        assert "No room is left" in (home.error(job_id) or "")
        with home.db.read() as session:
            assert registry.sae_names(session) == {"s-k4"}
            before = registry.sae(session, "s-k4").sha256
        monkeypatch.setattr(training, "publish_sae", publish)
        home.jobs.retry(job_id)
        assert home.wait(job_id) == "done", home.error(job_id)
    with home.db.read() as session:
        assert registry.sae_names(session) == {"s-k4", "s-k8"}
        assert registry.sae(session, "s-k4").sha256 == before


def test_a_running_sweep_is_cancelled_at_its_next_batch(home: Home) -> None:
    job_id = home.jobs.enqueue_sweep(LONG, name="s")
    with working(home) as worker:
        wait_for(lambda: any((home.folder(job_id) / "runs" / "000" / "checkpoints").glob("step-*")))
        home.jobs.cancel(job_id)
        wait_for(lambda: not worker.busy, 20)
    assert home.status(job_id) == "cancelled"
    with home.db.read() as session:
        assert registry.sae_names(session) == set()


# ---- names ----


def test_names_are_never_taken_twice(home: Home) -> None:
    assert home.jobs.enqueue_sweep(PAIR, name="x") == "sweep-x-1"
    assert home.jobs.enqueue_sweep(PAIR, name="x") == "sweep-x-2"
    assert home.jobs.enqueue_train(BASE, name="x-k4") == "train-x-k4-2", "an open sweep will make x-k4"
    assert home.jobs.enqueue_train(BASE, name="x") == "train-x-1"
    only = SweepConfig(base=BASE, seeds=(0,))
    assert home.jobs.enqueue_sweep(only.model_copy(update={"seeds": ()}), name="x") == "sweep-x-3"  # x and x-2 are taken


def test_the_default_name_changes_with_any_setting(home: Home) -> None:
    other = SweepConfig(base=BASE.model_copy(update={"lr": 1e-4}), ks=(4, 8))
    first, second = home.jobs.enqueue_sweep(PAIR), home.jobs.enqueue_sweep(other)
    assert first.startswith("sweep-tiny-")
    assert first.removesuffix("-1") != second.removesuffix("-1")


def test_the_longest_names_fit_the_job_book(home: Home) -> None:
    wide = SweepConfig(
        base=BASE.model_copy(update={"harvests": (HarvestConfig(),)}),
        layers=(127,), archs=("matryoshka",), ks=(1024,), expansions=(256,), seeds=(123456,),
    )  # fmt: skip
    job_id = home.jobs.enqueue_sweep(wide, name="n" * NAME_LENGTH)
    (name,) = run_names(job_id, wide, wide.runs(128))
    assert len(harvest_id(HarvestJob(sae=name, corpus="words"))) <= 100


def test_a_sweep_of_all_layers_is_said_to_be_one(home: Home) -> None:
    everything = SweepConfig(base=BASE, layers="all")
    assert home.jobs.get(home.jobs.enqueue_sweep(everything, name="a")).title == "Sweep a: SAEs on tiny, all layers"
    know_the_model(home)
    assert home.jobs.get(home.jobs.enqueue_sweep(everything, name="b")).title == "Sweep b: 4 SAEs on tiny, all layers"
    assert home.jobs.get(home.jobs.enqueue_sweep(SWEEP, name="c")).title == "Sweep c: 8 SAEs on tiny, layers 1, 3"


# ---- bad input ----


def test_what_cannot_be_is_refused_before_anything_is_queued(home: Home) -> None:
    with pytest.raises(UnknownCorpus):
        home.jobs.enqueue_sweep(SweepConfig(base=BASE.model_copy(update={"corpus": "nix"}), ks=(4,)))
    know_the_model(home)
    with pytest.raises(LayerOutOfRange, match="layers 0 to 3; there is no layer 9"):
        home.jobs.enqueue_sweep(SweepConfig(base=BASE, layers=(1, 9)))
    with pytest.raises(UsageError, match="k = 200 active features of 128") as refused:
        home.jobs.enqueue_sweep(SweepConfig(base=BASE, ks=(8, 200)))
    assert refused.value.field == "k"
    with pytest.raises(UsageError, match="k = 200 active features of 128"):
        home.jobs.enqueue_train(BASE.model_copy(update={"k": 200}))
    assert home.jobs.list() == []


def test_a_layer_that_turns_out_not_to_be_there_fails_with_its_sentence(home: Home) -> None:
    job_id = home.jobs.enqueue_sweep(SweepConfig(base=BASE, layers=(1, 9)))
    with working(home):
        assert home.wait(job_id) == "failed"
    assert "no layer 9" in (home.error(job_id) or "")


def test_a_setting_of_one_architecture_reaches_it_alone() -> None:
    base = BASE.model_copy(update={"site": Site(layer=0)})
    runs = SweepConfig(base=base, archs=("relu", "topk"), each={"relu": {"l1": 2.0, "lr": 1e-3}}).runs(4)
    assert [(run.arch, run.l1, run.lr) for run in runs] == [("relu", 2.0, 1e-3), ("topk", None, base.lr)]
    with pytest.raises(ValueError, match="l1 is read by relu"):
        SweepConfig(base=base, archs=("topk",), each={"topk": {"l1": 2.0}})
