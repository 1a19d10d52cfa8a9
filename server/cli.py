"""`headscope`: the command line. Errors are one sentence on stderr and exit code 2. No torch until a command needs it."""

import ctypes
import gc
import json
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NoReturn, TypeVar, get_args

import sqlalchemy as sa
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table

from sae_core.config import (
    BELONGS,
    AnyStudy,
    Arch,
    CorpusSource,
    DashboardsJob,
    EvaluateConfig,
    EvaluateJob,
    HarvestConfig,
    HarvestJob,
    HeadsStudy,
    ImportJob,
    InductionStudy,
    IoiStudy,
    ModelSource,
    PrefixStudy,
    RowsConfig,
    Site,
    SpecificityStudy,
    SweepConfig,
    TrainConfig,
    TranscoderFiles,
    Wishes,
)
from sae_core.errors import (
    DatabaseAway,
    DataFolderNotWritable,
    DiskFull,
    EmptyCorpus,
    HeadscopeError,
    MachineError,
    UnknownCorpus,
    UnknownModel,
    UsageError,
)
from sae_core.presets import PRESETS
from server import doctor as doctors
from server import estimates, jobs, terminal, tracking, up
from server.db import Database, sqlite_path
from server.fields import split_texts
from server.jobs import Jobs, slug
from server.keeping import backup, migrate, removal, room, stored
from server.keeping import gc as garbage
from server.options import built, given, options, takes
from server.passwords import hashed
from server.settings import Settings, read_secret
from server.store import accounts, manage, registry, search, stored_harvests, studies, sweeps, transcoders
from server.store.saes import find_sae

if TYPE_CHECKING:
    from sae_core.lens import Lens

app = typer.Typer(
    name="headscope",
    help="A self-hosted browser for what attention layers compute. Start with `headscope demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
db_app = typer.Typer(help="The database.", no_args_is_help=True)
model_app = typer.Typer(help="Language models, registered by name.", no_args_is_help=True)
corpus_app = typer.Typer(help="Bodies of text, registered by name.", no_args_is_help=True)
study_app = typer.Typer(
    help="Questions put to a feature, or to the heads of a model; the answers have pages.", no_args_is_help=True
)
app.add_typer(db_app, name="db")
app.add_typer(model_app, name="model")
app.add_typer(corpus_app, name="corpus")
import_app = typer.Typer(help="SAEs, transcoders and dashboards that others made.", no_args_is_help=True)
export_app = typer.Typer(help="SAEs and harvests, in the forms that others read.", no_args_is_help=True)
app.add_typer(import_app, name="import")
app.add_typer(export_app, name="export")
harvests_app = typer.Typer(help="Harvests that are stored.", no_args_is_help=True)
app.add_typer(harvests_app, name="harvests")
saes_app = typer.Typer(help="SAEs that are there.", no_args_is_help=True)
app.add_typer(saes_app, name="saes")
transcoders_app = typer.Typer(help="Transcoders of models' MLPs, which circuits go through.", no_args_is_help=True)
app.add_typer(transcoders_app, name="transcoders")
user_app = typer.Typer(help="People who may log in.", no_args_is_help=True)
app.add_typer(user_app, name="user")
key_app = typer.Typer(help="Keys for scripts.", no_args_is_help=True)
app.add_typer(key_app, name="key")
app.add_typer(study_app, name="study")

Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of databases, SAEs and running jobs.", envvar="HEADSCOPE_DATA", show_envvar=True),
]
Port = Annotated[int | None, typer.Option("--port", help="Port of the web pages.", show_default="8000")]
Host = Annotated[str | None, typer.Option("--host", help="Address of the web pages.", show_default="127.0.0.1")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps.", show_default="the first GPU, else the CPU")
]

Processes = Annotated[
    int | None,
    typer.Option("--processes", help="Processes that train together, a GPU each; results are the same.", show_default="1"),
]

console = Console(highlight=False)
S = TypeVar("S")


# ------------------------------------------------------------------------------------------------------------- processes


@app.command(epilog="Example: [bold]headscope demo[/bold]")
def demo(
    data: Data = None,
    port: Port = None,
    queue: Annotated[bool, typer.Option("--queue", help="Fetch and queue, and leave the rest to workers that run.")] = False,
) -> None:
    """Fetch a real model and real text, train on them and show the result while it is made."""
    from server import demo as demos

    settings = _settings(data=data, port=port)
    demos.queue(settings) if queue else demos.run(settings)


@app.command("up", epilog="Example: [bold]headscope up --port 8080[/bold]")
def up_(data: Data = None, host: Host = None, port: Port = None) -> None:
    """Start web, worker and engine together; Ctrl-C stops them and loses nothing."""
    doctors.need_worker_extra()
    up.run(_settings(data=data, host=host, port=port).prepare(), _say)


@app.command(epilog="Example: [bold]headscope serve --port 8080[/bold]")
def serve(
    data: Data = None,
    host: Host = None,
    port: Port = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Processes that answer; one fills a core.", show_default="1", min=1, max=64),
    ] = None,
) -> None:
    """Start the web pages alone. Needs no torch."""
    settings = _settings(data=data, host=host, port=port, web_workers=workers)
    gc.disable()  # what is loaded has next to no garbage in it, and looking for some takes a tenth of the start
    with _opened(settings) as (_, db):
        from server import watch
        from server.access import ensure_admin
        from server.app import create_app

        ensure_admin(settings, db)
        _watched(settings, "web")
        db.close()  # a connection must not be shared by processes that are forked
        with watch.shared(settings.web_workers) as folder:
            web = create_app(settings, folder)
            _share_heaps()
            _uvicorn(web, settings, settings.host, settings.port, "Headscope's pages are", settings.web_workers)


@app.command(epilog="Example, one worker per GPU: [bold]headscope worker --id gpu1 --device cuda:1[/bold]")
def worker(
    data: Data = None,
    worker_id: Annotated[
        str | None,
        typer.Option("--id", help="Name of this worker's slot; each live worker has its own.", show_default="the first free one"),
    ] = None,
    device: Device = None,
    processes: Processes = None,
) -> None:
    """Start a worker: it trains and harvests what is queued, one job at a time."""
    doctors.need_worker_extra()
    with _opened(_settings(data=data, worker_id=worker_id, device=device, processes=processes)) as (settings, db):
        _give_token(settings)
        _allow_wandb(settings)
        from server.worker import run_worker

        _watched(settings, "worker")
        run_worker(settings, db)
        _leave()


@app.command(epilog="Example: [bold]headscope engine[/bold]")
def engine(data: Data = None, device: Device = None) -> None:
    """Start the engine, which answers the pages' live questions on typed text."""
    doctors.need_worker_extra()
    with _opened(_settings(data=data, device=device)) as (settings, db):
        _give_token(settings)
        from server.engine import create_engine

        port = settings.engine_port or settings.port + 1
        _watched(settings, "engine")
        _uvicorn(create_engine(settings, db), settings, settings.engine_host, port, "The engine is")


# ------------------------------------------------------------------------------------------------------------------ jobs


OF_JOB = options(Wishes)
OF_TRAIN = (
    OF_JOB,
    options(RowsConfig, skip=("seed",)),
    {"rows_seed": options(RowsConfig, prefix="rows-")["rows_seed"]},
    options(TrainConfig, skip=("model", "corpus", "site", "rows", "harvests")),
    options(HarvestConfig, skip=("tokens",), prefix="harvest-"),
)
FLAGS = {"rows.": "", "rows.seed": "rows-seed", "site.": "", "harvests.": "harvest-", "base.": ""}
"""How fields of inner configs are called on the command line."""

Text = Annotated[str, typer.Option("--corpus", help="A registered name, a file or folder of text, or hf:<data set>.")]
LanguageModel = Annotated[str, typer.Option("--model", help="A registered name, a hub name, a local folder or a .gguf file.")]
Layers = Annotated[
    str | None,
    typer.Option("--layers", metavar="<int>,...|all", help="Several layers, an SAE each; one model pass reads them all."),
]
Preset = Annotated[
    str | None, typer.Option("--preset", help="Published settings, such as kissane-gpt2-l5; options given here win.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A JSON file of a whole config; options given here win.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the hub.")]
Wandb = Annotated[
    str | None, typer.Option("--wandb", help="Send the curves to this project of Weights & Biases.", show_default="nowhere")
]
Watch = Annotated[bool, typer.Option("--watch", help="With a worker running: stay and show progress.")]
HarvestTokens = Annotated[
    list[int] | None,
    typer.Option(
        "--harvest-tokens",
        help="Tokens of a harvest after training; repeat it for several, each replaces the former; 0 for none.",
    ),
]


@app.command(
    epilog="Examples: [bold]headscope train --model gpt2 --layer 5 --corpus hf:NeelNanda/pile-10k[/bold]; "
    "[bold]headscope train --model ./llama.gguf --layers 0,9,17 --corpus ./texts --tokens 2000000 --expansion 16[/bold]"
)
@takes(*OF_TRAIN)
def train(
    model: LanguageModel = "",
    layer: Annotated[int | None, typer.Option("--layer", help="Layer whose attention output is read, from 0.")] = None,
    layers: Layers = None,
    corpus: Text = "",
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the SAE.", show_default="made of model, layer and config")
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    revision: Revision = None,
    harvest_tokens: HarvestTokens = None,
    watch: Watch = False,
    wandb: Wandb = None,
    data: Data = None,
    device: Device = None,
    processes: Processes = None,
    **values: Any,
) -> None:
    """Train an SAE on a layer's attention output, evaluate it, and harvest it.

    With a worker running the job is queued for it; without one it runs here, and can be gone on with after Ctrl-C.
    """
    if layer is not None and layers is not None:
        raise UsageError("--layer names one layer and --layers several; give one of them.", field="layers")
    wishes = built(Wishes, given(values, Wishes))
    raw = _training(values, preset, config, harvest_tokens, model, corpus)
    if layer is not None:
        raw["site"] = {"layer": layer}
    listed = given({"layers": layers}, SweepConfig)
    settings = _settings(data=data, device=device, wandb=wandb, processes=processes)
    _train(settings, raw, listed, wishes, name=name, revision=revision, watch=watch)


@app.command(
    epilog="Example: [bold]headscope sweep --model gpt2 --corpus ./texts --layers 5,9 --archs relu,topk,batchtopk "
    "--ks 16,32,64 --expansions 8,16[/bold]"
)
@takes(options(SweepConfig, skip=("base", "layers", "each")), *OF_TRAIN)
def sweep(
    model: LanguageModel = "",
    layer: Annotated[int | None, typer.Option("--layer", help="The only layer; --layers names several.")] = None,
    layers: Layers = None,
    corpus: Text = "",
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="Name of the sweep, with which its SAEs' names begin.", show_default="made of model and config"
        ),
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    revision: Revision = None,
    harvest_tokens: HarvestTokens = None,
    watch: Watch = False,
    wandb: Wandb = None,
    data: Data = None,
    device: Device = None,
    processes: Processes = None,
    **values: Any,
) -> None:
    """Train many SAEs on one stream of activations, every combination of what is listed, and compare them.

    Each becomes an SAE of its own, evaluated; none is harvested unless --harvest-tokens asks for it.
    """
    if layer is not None and layers is not None:
        raise UsageError("--layer names one layer and --layers several; give one of them.", field="layers")
    wishes = built(Wishes, given(values, Wishes))
    raw = _training(values, preset, config, harvest_tokens or [0], model, corpus)
    if layer is not None:
        raw["site"] = {"layer": layer}
    listed = given({**values, "layers": layers}, SweepConfig)
    if not listed:
        raise UsageError("Say what to vary: --layers, --archs, --ks, --expansions or --seeds; `headscope train` makes one SAE.")
    settings = _settings(data=data, device=device, wandb=wandb, processes=processes)
    _train(settings, raw, listed, wishes, name=name, revision=revision, watch=watch)


@app.command(
    epilog="Examples: [bold]headscope harvest --sae gpt2-l5-1a2b3c --tokens 4000000[/bold]; "
    "[bold]headscope harvest --model gpt2[/bold]"
)
@takes(OF_JOB, options(HarvestConfig))
def harvest(
    saes: Annotated[
        list[str] | None,
        typer.Option("--sae", help="Name of an SAE; repeat it for several of one model, which share every pass."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="All SAEs of this model, in one pass.")] = None,
    corpus: Annotated[str | None, typer.Option("--corpus", help="Text to sweep.", show_default="the training's")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="With a worker running: stay and show progress.")] = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Sweep text through SAEs that exist: statistics, examples and their attribution, published when complete."""
    wishes = built(Wishes, given(values, Wishes))
    harvest_config = built(HarvestConfig, given(values, HarvestConfig))
    with _opened(_settings(data=data, device=device)) as (settings, db):
        _give_token(settings)
        records = _swept(db, saes or [], model)
        texts = [_corpus_for(db, record, corpus, "sweep") for record in records]
        found, rows = texts[0]
        if any((other.name, rows_) != (found.name, rows) for other, rows_ in texts):
            raise UsageError(
                f"{records[0].name} and others of these SAEs were trained on other rows of text, and one sweep reads the same "
                "rows for all; harvest those of each training together.",
                field="sae",
            )
        rows = rows or RowsConfig(context=records[0].config.context, tokens=harvest_config.tokens, heldout_tokens=0)
        cfg = HarvestJob(saes=tuple(r.name for r in records), corpus=found.name, rows=rows, harvest=harvest_config)
        queue = Jobs(settings, db, wishes)
        alive = queue.worker_alive()
        if not alive:
            doctors.need_worker_extra()
        with db.write() as session:
            registry.add_corpus(session, found.name, found.source)
        job_id = queue.enqueue_harvest(cfg)
        job = queue.get(job_id)
        with db.read() as session:
            there = stored_harvests.n_made_by(session, job_id) == len(cfg.saes)
        if job.status == "done" and there:
            _say(f"{job_id} is done already: the same sweep would give the same numbers.")
            return
        if job.ended:
            queue.retry(job_id, even_done=True)
        _say(f"Queued {job_id}.")
        if not alive:
            _work_here(settings, db, job_id)
        elif watch:
            _end(db, _watch_here(db, job_id))


@app.command(
    epilog="Examples: [bold]headscope evaluate gpt2-l5-1a2b3c[/bold]; "
    "[bold]headscope evaluate mine --against mine-seed-2 --probe languages.jsonl --json[/bold]"
)
@takes(OF_JOB, options(EvaluateConfig))
def evaluate(
    sae: Annotated[str, typer.Argument(help="Name of the SAE.")],
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Text to measure it on.", show_default="what training held out")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="Another SAE of the same site, to match features with; may be repeated.")
    ] = None,
    probes: Annotated[
        list[Path] | None,
        typer.Option(
            "--probe",
            help="Labelled texts for probing: a jsonl file, or a folder with a folder per label; may be repeated.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Wait for the end and print one JSON object.")] = False,
    watch: Watch = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Measure an SAE that exists: reconstruction, loss of the model with it, features; its page shows the result."""
    wishes = built(Wishes, given(values, Wishes))
    how = built(EvaluateConfig, given(values, EvaluateConfig))
    for path in probes or []:
        if not path.exists():
            raise UnknownCorpus(f"There is no file or folder {path}.", field="probe")
    with _opened(_settings(data=data, device=device)) as (settings, db), _aside(as_json):
        _give_token(settings)
        with db.read() as session:
            record = registry.sae(session, sae)
            for name in against or []:
                registry.sae(session, name)
        found, rows = _corpus_for(db, record, corpus, "measure")
        rows = rows or RowsConfig(context=record.config.context, tokens=max(record.config.context, how.dead_tokens))
        cfg = EvaluateJob(
            sae=sae,
            corpus=found.name,
            rows=rows,
            against=tuple(dict.fromkeys(against or ())),
            probes=tuple(str(path.resolve()) for path in probes or ()),
            evaluate=how,
        )
        queue = Jobs(settings, db, wishes)
        alive = queue.worker_alive()
        if not alive:
            doctors.need_worker_extra()
        with db.write() as session:
            registry.add_corpus(session, found.name, found.source)
        job_id = queue.enqueue_evaluate(cfg)
        _say(f"Queued {job_id}.")
        if not alive:
            _work_here(settings, db, job_id)
        elif watch or as_json:
            _end(db, _watch_here(db, job_id))
        else:
            return
        with db.read() as session:
            metrics = registry.metrics(session, sae)
    if as_json:
        console.print_json(json.dumps(metrics))
    else:
        _table(("measure", "value"), terminal.measures(metrics), "")


# --------------------------------------------------------------------------------------------------------------- studies


TEXTS, EXPRESSION = "<text>,...", "<expression>"
OfSae = Annotated[str, typer.Option("--sae", help="Name of the SAE.")]
AsJson = Annotated[bool, typer.Option("--json", help="Wait for the end and print one JSON object.")]
TextToSee = Annotated[
    str | None,
    typer.Option("--corpus", help="Real text to see them in; none leaves it out.", show_default="of the model's newest SAE"),
]


@study_app.command(
    "specificity",
    epilog='Examples: [bold]headscope study specificity --sae mine --feature 14 --induction " board"[/bold]; '
    '[bold]headscope study specificity --sae mine --feature 7 --tokens " he, she" --not-regex "[.!?] \\w+"[/bold]',
)
@takes(OF_JOB, options(SpecificityStudy, skip=("kind", "sae", "feature", "corpus", "rows", "proxies")))
def study_specificity(
    sae: OfSae,
    feature: Annotated[int, typer.Option("--feature", help="Index of the feature.")],
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens",
            help="The token is one of these, spaces and all; a comma that belongs to one has a backslash before it.",
            metavar=TEXTS,
        ),
    ] = None,
    regex: Annotated[
        list[str] | None,
        typer.Option(
            "--regex", help="A match ends where the row's text, up to and including the token, ends.", metavar=EXPRESSION
        ),
    ] = None,
    token_regex: Annotated[
        list[str] | None, typer.Option("--token-regex", help="The token's own text matches.", metavar=EXPRESSION)
    ] = None,
    induction: Annotated[
        list[str] | None,
        typer.Option(
            "--induction",
            help="One of these is next by induction: the token stood earlier in the row, followed by it.",
            metavar=TEXTS,
        ),
    ] = None,
    not_tokens: Annotated[
        list[str] | None, typer.Option("--not-tokens", help="The token is none of these.", metavar=TEXTS)
    ] = None,
    not_regex: Annotated[list[str] | None, typer.Option("--not-regex", help="No match ends there.", metavar=EXPRESSION)] = None,
    not_token_regex: Annotated[
        list[str] | None, typer.Option("--not-token-regex", help="The token's own text does not match.", metavar=EXPRESSION)
    ] = None,
    not_induction: Annotated[
        list[str] | None, typer.Option("--not-induction", help="None of these is next by induction.", metavar=TEXTS)
    ] = None,
    corpus: Annotated[str | None, typer.Option("--corpus", help="Text to read.", show_default="the training's")] = None,
    as_json: AsJson = False,
    watch: Watch = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Hold a feature against a proxy that you write: how specific and how sensitive it is, with examples of where they differ.

    Several proxies, or one given several times, must all hold.
    """
    proxies = [
        proxy | {"negated": negated}
        for negated, written in (
            (False, (tokens, regex, token_regex, induction)),
            (True, (not_tokens, not_regex, not_token_regex, not_induction)),
        )
        for proxy in _proxies(*written)
    ]
    if not proxies:
        raise UsageError(
            "Say what the feature is held against: --tokens, --regex, --token-regex or --induction.", field="proxies"
        )
    raw = {"sae": sae, "feature": feature, "proxies": proxies} | given(values, SpecificityStudy)
    built(SpecificityStudy, raw | {"corpus": "checked-later"}, OF_STUDY)
    with _opened(_settings(data=data, device=device)) as (settings, db), _aside(as_json):
        _give_token(settings)
        with db.read() as session:
            record = registry.sae(session, sae)
        found, rows = _corpus_for(db, record, corpus, "read")
        cfg = built(SpecificityStudy, raw | {"corpus": found.name}, OF_STUDY)
        rows = rows or RowsConfig(context=record.config.context, tokens=cfg.tokens_swept, heldout_tokens=0)
        jobs.check_feature(record, feature)
        with db.write() as session:
            registry.add_corpus(session, found.name, found.source)
        wishes = built(Wishes, given(values, Wishes))
        made = _study(settings, db, cfg.model_copy(update={"rows": rows}), wishes, wait=watch or as_json)
    _show_study(made, as_json)


@study_app.command(
    "heads",
    epilog="Examples: [bold]headscope study heads --model gpt2[/bold]; "
    "[bold]headscope study heads --model smollm2 --layers 16,17,18 --corpus none[/bold]",
)
@takes(OF_JOB, options(HeadsStudy, skip=("kind", "model", "corpus", "rows")))
def study_heads(
    model: LanguageModel,
    corpus: TextToSee = None,
    revision: Revision = None,
    as_json: AsJson = False,
    watch: Watch = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Score every head: where it attends (token before, copies, induction, row start), what it writes (copies, successors)."""
    _study_of_heads(HeadsStudy, model, corpus, revision, values, as_json=as_json, watch=watch, data=data, device=device)


@study_app.command(
    "induction",
    epilog="Examples: [bold]headscope study induction --model gpt2 --layers 5[/bold]; "
    "[bold]headscope study induction --model smollm2 --corpus ./texts --samples 400[/bold]",
)
@takes(OF_JOB, options(InductionStudy, skip=("kind", "model", "corpus", "rows")))
def study_induction(
    model: LanguageModel,
    corpus: TextToSee = None,
    revision: Revision = None,
    as_json: AsJson = False,
    watch: Watch = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Find the heads that do induction, and tell those that need a long repeated prefix from those that need one token."""
    _study_of_heads(InductionStudy, model, corpus, revision, values, as_json=as_json, watch=watch, data=data, device=device)


def _study_of_sae(kind: type[IoiStudy | PrefixStudy], about: str, more: str) -> None:
    """Add the command of a study of an SAE that needs no text."""
    name = kind.model_fields["kind"].default
    usual = f"headscope study {name} --sae mine"

    @study_app.command(name, help=about, epilog=f"Examples: [bold]{usual}[/bold]; [bold]{usual} {more}[/bold]")
    @takes(OF_JOB, options(kind, skip=("kind", "sae")))
    def study(
        sae: OfSae, as_json: AsJson = False, watch: Watch = False, data: Data = None, device: Device = None, **values: Any
    ) -> None:
        cfg = built(kind, {"sae": sae} | given(values, kind), {})
        with _opened(_settings(data=data, device=device)) as (settings, db), _aside(as_json):
            _give_token(settings)
            made = _study(settings, db, cfg, built(Wishes, given(values, Wishes)), wait=watch or as_json)
        _show_study(made, as_json)


_study_of_sae(
    IoiStudy,
    'Ablate features at the second subject of "When Mary and John ... John gave it to", and ask what their layer says there.',
    "--samples 40 --layers 5,6",
)
_study_of_sae(
    PrefixStudy,
    "Find the features that do induction, tell those that need a long repeated prefix, and ablate them.",
    "--samples 100 --length 128",
)


def _study_of_heads(
    kind: type[HeadsStudy | InductionStudy],
    model: str,
    corpus: str | None,
    revision: str | None,
    values: dict[str, Any],
    *,
    as_json: bool,
    watch: bool,
    data: Path | None,
    device: str | None,
) -> None:
    """A study of a model's heads, on the text of its newest SAE unless another is named."""
    raw = given(values, kind)
    built(kind, raw | {"model": "checked-later"}, OF_STUDY)
    with _opened(_settings(data=data, device=device)) as (settings, db), _aside(as_json):
        _give_token(settings)
        found = _find_model(db, model, revision)
        with db.read() as session:
            trained = studies.training_of(session, found.name)
        asked = corpus if corpus is not None else trained.corpus if trained else "none"
        text = None if asked == "none" else _find_corpus(db, asked)
        cfg = built(kind, raw | {"model": found.name, "corpus": text.name if text else None}, OF_STUDY)
        if text:
            same = trained is not None and trained.corpus == text.name
            own = RowsConfig(context=cfg.length, tokens=cfg.text_rows * cfg.length, heldout_tokens=0)
            cfg = cfg.model_copy(update={"rows": trained.rows if trained and same else own})
        if text and text.new:
            _check_text(text.source)
        with db.write() as session:
            registry.add_model(session, found.name, found.source)
            if text:
                registry.add_corpus(session, text.name, text.source)
        made = _study(settings, db, cfg, built(Wishes, given(values, Wishes)), wait=watch or as_json)
    _show_study(made, as_json)


OF_STUDY = {f"proxies.{name}": "" for name in ("texts", "pattern")}


def _proxies(
    tokens: list[str] | None, regex: list[str] | None, token_regex: list[str] | None, induction: list[str] | None
) -> Iterator[dict[str, Any]]:
    """The proxies that were written, not checked yet."""
    for kind, texts in (("tokens", tokens), ("induction", induction)):
        for text in texts or ():
            if not text:
                raise UsageError(f"--{kind} is empty; name one token or more, such as --{kind} ' board'.", field=kind)
            yield {"kind": kind, "texts": split_texts(text)}
    for on, name, patterns in (("text", "regex", regex), ("token", "token-regex", token_regex)):
        for pattern in patterns or ():
            if not pattern:
                raise UsageError(f"--{name} is empty; write an expression, such as --{name} '[0-9]$'.", field=name)
            yield {"kind": "regex", "pattern": pattern, "on": on}


def _study(settings: Settings, db: Database, cfg: AnyStudy, wishes: Wishes, *, wait: bool) -> studies.StudyRecord | None:
    """Queue a study, or make it here when no worker runs; what it found, unless that is left to a worker."""
    queue = Jobs(settings, db, wishes)
    alive = queue.worker_alive()
    job_id = queue.enqueue_study(cfg)
    if (job := queue.get(job_id)).status == "done":
        _say(f"{job_id} is done already: the same question would get the same answer.")
    else:
        if not alive:
            doctors.need_worker_extra()
        if job.status in ("failed", "cancelled"):
            queue.retry(job_id)
        _say(f"Queued {job_id}.")
        if not alive:
            _work_here(settings, db, job_id)
        elif wait:
            _end(db, _watch_here(db, job_id))
        else:
            return None
    with db.read() as session:
        made = studies.of_job(session, job_id)
        return studies.study(session, made) if made is not None else None


def _show_study(made: studies.StudyRecord | None, as_json: bool) -> None:
    if made is None:
        return
    if as_json:
        console.print_json(json.dumps(made.result))
        return
    _table(("measure", "value"), terminal.study(made.result), "")
    _say(f"Its plots are at /studies/{made.id}.")


# ------------------------------------------------------------------------------------------------------ in from others, out


@import_app.command(
    "sae",
    epilog="Examples: [bold]headscope import sae ./my-saelens-folder --model gpt2[/bold]; "
    "[bold]headscope import sae google/gemma-scope-2b-pt-att/layer_12/width_16k/average_l0_41 --model google/gemma-2-2b[/bold]",
)
@takes(OF_JOB, options(ImportJob, skip=("location", "model")))
def import_sae(
    location: Annotated[str, typer.Argument(help="A file, a folder, or <owner>/<repository>/<folder> on the hub.")],
    model: LanguageModel,
    name: Annotated[str | None, typer.Option("--name", help="Name of the SAE here.", show_default="made of the location")] = None,
    watch: Watch = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Make a peer's SAE one of ours: SAELens, Gemma Scope, Kissane et al., dictionary_learning, sparsify."""
    path = Path(location).expanduser()
    raw = {"location": str(path.resolve()) if path.exists() else location} | given(values, ImportJob)
    built(ImportJob, raw | {"model": "checked-later"})
    with _opened(_settings(data=data, device=device)) as (settings, db):
        _give_token(settings)
        found = _find_model(db, model, None)
        cfg = built(ImportJob, raw | {"model": found.name})
        queue = Jobs(settings, db, built(Wishes, given(values, Wishes)))
        alive = queue.worker_alive()
        if not alive:
            doctors.need_worker_extra()
        with db.write() as session:
            registry.add_model(session, found.name, found.source)
        job_id = queue.enqueue_import(cfg, name=name)
        _say(f"Queued {job_id}.")
        if not alive:
            _work_here(settings, db, job_id)
        elif watch:
            _end(db, _watch_here(db, job_id))


@import_app.command(
    "transcoder",
    epilog="Examples: [bold]headscope import transcoder ./layer_10 --model smollm2[/bold]; "
    "[bold]headscope import transcoder google/gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_74 "
    "--model google/gemma-2-2b[/bold]",
)
@takes(options(TranscoderFiles, skip=("location",)))
def import_transcoder(
    location: Annotated[str, typer.Argument(help="A file, a folder, or <owner>/<repository>/<file or folder> on the hub.")],
    model: LanguageModel,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of the layer's transcoder.")] = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Give a model a transcoder of one of its MLPs, for circuits: SAELens, Gemma Scope 1 and 2, sparsify, circuit-tracer."""
    doctors.need_worker_extra()
    from sae_core.formats import fetched
    from sae_core.formats.transcoders import fitted, open_transcoder, tried
    from sae_core.transcoders import save_transcoder

    said = built(TranscoderFiles, {"location": location} | given(values, TranscoderFiles))
    with _opened(_settings(data=data, device=device)) as (settings, db):
        _give_token(settings)
        peer, found = open_transcoder(fetched(location, said.revision), said.format), _find_model(db, model, None)
        with db.read() as session:
            transcoders.check_free(session, found.name, peer.layer if said.layer is None else said.layer, replace=replace)
        lens = _load(settings, found.name, found.source)
        made = fitted(peer, lens, said)
        fit, cfg = tried(lens, made), made.cfg
        file = f"{transcoders.HOME}/{slug(found.name)}-l{cfg.layer}-{secrets.token_hex(4)}.safetensors"
        sha256 = save_transcoder(made, settings.data / file)
        with db.write() as session:
            registry.add_model(session, found.name, found.source)
            registry.note_shape(session, found.name, lens.info)
            kept = {**cfg.model_dump(mode="json"), "fvu": fit.fvu, "l0": fit.l0}
            new = transcoders.TranscoderRecord(found.name, cfg.layer, made.n_features, kept, file, sha256)
            before = transcoders.put(session, new, replace=replace)
        if before is not None:
            (settings.data / before).unlink(missing_ok=True)
    _say(
        f"Layer {cfg.layer} of {found.name} has a transcoder of {made.n_features:,} features; it reads {cfg.reads}, writes "
        f"{cfg.writes}. On a short text {fit.l0:.0f} features fire a token, and {fit.fvu:.0%} of the variance of what the MLP "
        "adds is left."
    )
    for other, fvu in fit.otherwise.items():
        if fvu < 0.7 * fit.fvu:
            _say(f"With --reads {other} {fvu:.0%} would be left: see what it was trained on.")


@import_app.command(
    "dashboards",
    epilog="Examples: [bold]headscope import dashboards ./saedashboard-output --sae gpt2-l5[/bold]; "
    "[bold]headscope import dashboards ./v1/gpt2-small/5-att-kk --sae gpt2-l5[/bold]",
)
@takes(OF_JOB, options(DashboardsJob, skip=("location", "sae")))
def import_dashboards(
    location: Annotated[
        Path, typer.Argument(help="Folder of SAEDashboard's batch-*.json, or of one source of Neuronpedia's files.")
    ],
    sae: Annotated[str, typer.Option("--sae", help="Name of the SAE whose features they show.")],
    watch: Watch = False,
    data: Data = None,
    **values: Any,
) -> None:
    """Make dashboards of SAEDashboard or Neuronpedia a harvest that can be browsed; explanations become labels."""
    from server.exchange import dashboards

    folder = location.expanduser().resolve()
    cfg = built(DashboardsJob, {"location": str(folder), "sae": sae} | given(values, DashboardsJob))
    with _opened(_settings(data=data)) as (settings, db):
        dashboards.look(folder)  # what is wrong with the folder is said before anything is queued
        queue = Jobs(settings, db, built(Wishes, given(values, Wishes)))
        alive = queue.worker_alive()
        if not alive:
            doctors.need_worker_extra()
        job_id = queue.enqueue_dashboards(cfg)
        with db.read() as session:
            there = stored_harvests.n_made_by(session, job_id) > 0
        job = queue.get(job_id)
        if job.status == "done" and there:
            _say(f"{job_id} is done already; `headscope harvests list` shows what it made.")
            return
        if job.ended:
            queue.retry(job_id, even_done=True)
        _say(f"Queued {job_id}.")
        if not alive:
            _work_here(settings, db, job_id)
        elif watch:
            _end(db, _watch_here(db, job_id))


@export_app.command("sae", epilog="Example: [bold]headscope export sae gpt2-l5-1a2b3c ./for-saelens[/bold]")
def export_sae(
    sae: Annotated[str, typer.Argument(help="Name of the SAE.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    data: Data = None,
) -> None:
    """Write an SAE as a folder that SAELens 6 loads."""
    doctors.need_worker_extra()
    with _opened(_settings(data=data)) as (settings, db):
        with db.read() as session:
            record = registry.sae(session, sae)
        _need_empty(folder)
        from sae_core.formats import write_saelens
        from sae_core.saes import load_sae

        write_saelens(load_sae(settings.data / record.folder), folder)
    _say(f"{sae} is in {folder}; SAE.load_from_disk({str(folder)!r}) reads it.")


@export_app.command(
    "dashboards",
    epilog="Examples: [bold]headscope export dashboards gpt2-l5 ./out --form neuronpedia[/bold]; "
    "[bold]headscope export dashboards gpt2-l5 ./cache --form delphi[/bold]",
)
def export_dashboards(
    sae: Annotated[str, typer.Argument(help="Name of the SAE.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    form: Annotated[str, typer.Option("--form", help="saedashboard, neuronpedia or delphi.")] = "saedashboard",
    data: Data = None,
) -> None:
    """Write an SAE's published harvest for others: SAEDashboard's batches, Neuronpedia's bulk files, Delphi's latent cache."""
    from server.exchange import written
    from server.store import exports
    from server.store.saes import find_sae

    if form not in ("saedashboard", "neuronpedia", "delphi"):
        raise UsageError(f"There is no form {form}; there are saedashboard, neuronpedia and delphi.", field="form")
    with _opened(_settings(data=data)) as (_, db):
        with db.read() as session:
            door = find_sae(session, sae)
            source = registry.model(session, door.sae.model).source
        if door.sae.harvest is None:
            raise UsageError(f"{sae} has no published harvest to write; `headscope harvest` makes one.", field="sae")
        _need_empty(folder)
        features = exports.features(db, door)
        if form == "delphi":
            wrote = written.delphi(features, door.sae, folder, exports.token_rows(db, door), source.location)
        else:
            wrote = {"saedashboard": written.saedashboard, "neuronpedia": written.neuronpedia}[form](features, door.sae, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _say(f"{wrote.features:,} features with {wrote.examples:,} examples are in {folder} ({room.gigabytes(size)}).")


@export_app.command("html", epilog="Example: [bold]headscope export html 3 ./for-the-appendix[/bold]")
def export_html(
    list_id: Annotated[int, typer.Argument(metavar="LIST", help="Number of a feature list, as its address says it.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    data: Data = None,
) -> None:
    """Write a list of features as pages that open from disk."""
    from server.exchange import bundle
    from server.store.lists import list_page

    with _opened(_settings(data=data)) as (_, db), db.read() as session:
        listed = list_page(session, list_id)
        _need_empty(folder)
        n = bundle.write(session, listed, folder)
    _say(f"{n} features are in {folder}; open {folder / 'index.html'}.")


def _need_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; name a new folder.", field="folder")


# -------------------------------------------------------------------------------------------------------------- harvests


@harvests_app.command("list")
def harvests_list(data: Data = None) -> None:
    """Harvests that are stored: those that are shown, those that were replaced, those that are being written."""
    with _opened(_settings(data=data)) as (_, db), db.read() as session:
        rows = [
            (
                str(h.id),
                h.sae,
                h.status,
                f"{h.n_tokens:,}",
                f"{h.n_live:,}",
                f"{h.n_examples:,}",
                f"{h.created_at:%Y-%m-%d %H:%M}",
            )
            for h in stored_harvests.stored(session)
        ]
    names = ("id", "SAE", "state", "tokens", "live features", "examples", "begun")
    _table(names, rows, "Nothing has been harvested; `headscope harvest` does it.")


HarvestId = Annotated[int, typer.Argument(metavar="ID", help="As `headscope harvests list` says it.")]
SaeName = Annotated[str, typer.Argument(metavar="SAE", help="As `headscope saes list` says it.")]
NewName = Annotated[str | None, typer.Option("--name", help="What it is to be called.", show_default="as it is")]
Description = Annotated[str | None, typer.Option("--description", help="What is to be said of it.", show_default="as it is")]
Undo = Annotated[bool, typer.Option("--undo", help="Bring it back.")]


@harvests_app.command("delete", epilog="Example: [bold]headscope harvests delete 3[/bold]")
def harvests_delete(
    harvest_id: HarvestId,
    force: Annotated[bool, typer.Option("--force", help="Even the one that the pages show.")] = False,
    data: Data = None,
) -> None:
    """Delete a stored harvest: its features and examples. Pages stay usable meanwhile."""
    with _opened(_settings(data=data)) as (_, db):
        stored_harvests.delete(db, harvest_id, force=force)
        _say(f"Harvest {harvest_id} is deleted.")


@harvests_app.command("describe", epilog='Example: [bold]headscope harvests describe 3 --name "all of the corpus"[/bold]')
def harvests_describe(harvest_id: HarvestId, name: NewName = None, description: Description = None, data: Data = None) -> None:
    """Give a stored harvest a name and a description; what is not given stays."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        now = manage.harvest_line(session, harvest_id)
        manage.describe_harvest(session, harvest_id, _or(name, now.name), _or(description, now.description))
    _say(f"Harvest {harvest_id} is described.")


@harvests_app.command("archive", epilog="Example: [bold]headscope harvests archive 3[/bold]")
def harvests_archive(harvest_id: HarvestId, undo: Undo = False, data: Data = None) -> None:
    """Move a stored harvest to the end of the lists; nothing of it is deleted."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        manage.archive_harvest(session, harvest_id, not undo)
    _say(f"Harvest {harvest_id} is {'brought back' if undo else 'archived'}.")


# ------------------------------------------------------------------------------------------------------------------ SAEs


@saes_app.command("list")
def saes_list(data: Data = None) -> None:
    """SAEs that are there; archived ones last."""
    with _opened(_settings(data=data)) as (_, db), db.read() as session:
        rows = [
            (
                line.name,
                line.model,
                str(line.layer),
                line.arch,
                f"{line.d_sae:,}",
                "" if line.harvest is None else str(line.harvest),
                "archived" if line.archived_at else "",
                (line.description or "").partition("\n")[0],
            )
            for line in manage.sae_lines(session)
        ]
    names = ("name", "model", "layer", "architecture", "features", "harvest shown", "", "description")
    _table(names, rows, "There is no SAE; `headscope train` makes one.")


@saes_app.command(
    "describe", epilog='Example: [bold]headscope saes describe mine --name l17 --description "the best so far"[/bold]'
)
def saes_describe(sae: SaeName, name: NewName = None, description: Description = None, data: Data = None) -> None:
    """Give an SAE another name, which its former one still leads to, or a description; what is not given stays."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        door = find_sae(session, sae)
        called = manage.describe(session, door, _or(name, sae), _or(description, door.description))
    _say(f"{sae} is {f'called {called} now' if called != sae else 'described'}.")


@saes_app.command("archive", epilog="Example: [bold]headscope saes archive mine[/bold]")
def saes_archive(sae: SaeName, undo: Undo = False, data: Data = None) -> None:
    """Leave an SAE out of the first page; its pages stay."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        manage.archive(session, find_sae(session, sae), not undo)
    _say(f"{sae} is {'brought back' if undo else 'archived'}.")


@saes_app.command("visibility", epilog="Example: [bold]headscope saes visibility mine private --owner Ola[/bold]")
def saes_visibility(
    sae: SaeName,
    visibility: Annotated[str, typer.Argument(help="private, shared or public.")],
    owner: Annotated[str | None, typer.Option("--owner", help="Account that it belongs to from now on.")] = None,
    data: Data = None,
) -> None:
    """Say who sees an SAE, where there are accounts: its owner and admins, everybody with an account, or everybody."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        door = find_sae(session, sae)
        if owner is not None:
            manage.give(session, door, accounts.account_id(session, owner))
        manage.set_visibility(session, door, visibility)
        accounts.record(session, "set the visibility", sae)
    _say(f"{sae} is {visibility}.")


# ---------------------------------------------------------------------------------------------------------------- people

AccountName = Annotated[str, typer.Argument(help="Name of the account.")]
GivenRole = Annotated[str, typer.Argument(help="reader, editor or admin.")]
RoleName = Annotated[str, typer.Option("--role", help="reader, editor or admin.")]
PasswordFile = Annotated[
    Path | None, typer.Option("--password-file", help="File with the password.", show_default="asked for on the terminal")
]


def _password(path: Path | None) -> str:
    if path is None:
        return hashed(str(typer.prompt("Password", hide_input=True, confirmation_prompt=True)))
    try:
        return hashed(path.read_text().strip())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).", field="password-file") from error


@user_app.command("add", epilog="Example: [bold]headscope user add Maren --role editor --password-file maren.txt[/bold]")
def user_add(name: AccountName, role: RoleName = "reader", password_file: PasswordFile = None, data: Data = None) -> None:
    """Make an account."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        made = accounts.add(session, name, role, _password(password_file))
    _say(f"{made.name} may log in, as {made.role}.")


@user_app.command("list")
def user_list(data: Data = None) -> None:
    """List the accounts."""
    with _opened(_settings(data=data)) as (_, db), db.read() as session:
        rows = [(one.name, one.role, "kept out" if one.disabled_at else "") for one in accounts.people(session)]
    _table(("name", "role", ""), rows, "There are no accounts yet.")


@user_app.command("role", epilog="Example: [bold]headscope user role Maren admin[/bold]")
def user_role(name: AccountName, role: GivenRole, data: Data = None) -> None:
    """Let somebody do more, or less."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        accounts.set_role(session, name, role)
    _say(f"{name} is {role} now.")


@user_app.command("password")
def user_password(name: AccountName, password_file: PasswordFile = None, data: Data = None) -> None:
    """Give an account another password: all its browsers have to log in again."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        accounts.set_password(session, name, _password(password_file))
    _say(f"{name} has a new password.")


@user_app.command("remove")
def user_remove(name: AccountName, data: Data = None) -> None:
    """Take an account away with its browsers and keys; what it wrote stays under its name."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        accounts.remove(session, name)
    _say(f"{name} has no account any more.")


@key_app.command("add", epilog="Example: [bold]headscope key add Maren notebook --scope read --days 90[/bold]")
def key_add(
    name: AccountName,
    key_name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[str, typer.Option("--scope", help="read, write or admin; never more than the account's role.")] = "read",
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="Days until it runs out.")] = 90,
    data: Data = None,
) -> None:
    """Make a key for scripts. It is shown now and never again."""
    from server.access import new_key

    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        key, _made = new_key(session, accounts.account_id(session, name), key_name, scope, str(days))
    _say(key)


@key_app.command("list")
def key_list(data: Data = None) -> None:
    """List everybody's keys."""
    with _opened(_settings(data=data)) as (_, db), db.read() as session:
        kept = accounts.keys(session)
    until = ["revoked" if one.revoked_at else f"{one.expires_at:%Y-%m-%d}" if one.expires_at else "for good" for one in kept]
    rows = [(str(one.id), one.account, one.name, one.hint, one.scope, ends) for one, ends in zip(kept, until, strict=True)]
    _table(("id", "account", "name", "begins with", "may", "until"), rows, "There are no keys yet.")


@key_app.command("revoke")
def key_revoke(key: Annotated[int, typer.Argument(help="Id of the key, as `key list` shows it.")], data: Data = None) -> None:
    """Shut a key out."""
    with _opened(_settings(data=data)) as (_, db), db.write() as session:
        accounts.revoke_key(session, key)
    _say(f"Key {key} is revoked.")


@app.command("audit", epilog="Example: [bold]headscope audit --who Maren[/bold]")
def audit(
    who: Annotated[str, typer.Option("--who", help="Only this person's changes.", show_default="everybody's")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many, newest first.")] = 100,
    data: Data = None,
) -> None:
    """Show what was changed, by whom and from where."""
    with _opened(_settings(data=data)) as (_, db), db.read() as session:
        page = accounts.audit_page(session, who=who, limit=limit)
    rows = [(f"{one.at:%Y-%m-%d %H:%M}", one.who, one.way, one.address, one.action, one.target) for one in page.changes]
    _table(("when", "who", "how", "from", "what", "of what"), rows, "Nothing was changed yet.")


@saes_app.command("delete", epilog="Example: [bold]headscope saes delete mine --yes[/bold]")
def saes_delete(
    sae: SaeName,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this only what would go is said.")] = False,
    data: Data = None,
) -> None:
    """Delete an SAE with its harvests, its weights and all that people wrote about it."""
    with _opened(_settings(data=data)) as (settings, db):
        with db.read() as session:
            door = find_sae(session, sae)
            page = manage.manage_page(session, door)
        if not yes:
            named = {"harvests": len(page.harvests), **asdict(page.belongings)}
            what = ", ".join(f"{name.replace('_', ' ')}: {n}" for name, n in named.items() if n)
            raise UsageError(
                f"{sae} would go with its weights and all there is of it ({what or 'nothing else'}); add --yes.", field="yes"
            )
        manage.delete_sae(db, door, settings.data)
    _say(f"{sae} is deleted.")


def _or(given: str | None, kept: str | None) -> str:
    return given if given is not None else kept or ""


@transcoders_app.command("list")
def transcoders_list(data: Data = None) -> None:
    """Transcoders of models' MLPs, with what each was found to leave on a short text."""
    with _opened(_settings(data=data)) as (_, db), db.read() as session:
        rows = [
            (one.model, str(one.layer), f"{one.n_features:,}", f"{one.config['reads']} to {one.config['writes']}",
             f"{one.config['fvu']:.3f}", f"{one.config['l0']:.0f}", one.sha256[:12])
            for one in transcoders.every(session)
        ]  # fmt: skip
    heads = ("model", "layer", "features", "from", "FVU", "L0", "sha256")
    _table(heads, rows, "No model has a transcoder; `headscope import transcoder` gives it one.")


@transcoders_app.command("delete", epilog="Example: [bold]headscope transcoders delete smollm2 10 --yes[/bold]")
def transcoders_delete(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    layer: Annotated[int, typer.Argument(help="Layer of the MLP.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it.")] = False,
    data: Data = None,
) -> None:
    """Take a transcoder from its model, and delete its file."""
    with _opened(_settings(data=data)) as (settings, db):
        if not yes:
            raise UsageError(
                f"The transcoder of layer {layer} of {model} would be deleted with its file; add --yes.", field="yes"
            )
        with db.write() as session:
            file = transcoders.delete(session, model, layer)
        (settings.data / file).unlink(missing_ok=True)
    _say(f"Layer {layer} of {model} has no transcoder any more.")


# ------------------------------------------------------------------------------------------------------------- registers


@db_app.command("upgrade", epilog="Example: [bold]headscope db upgrade[/bold]")
def db_upgrade(data: Data = None) -> None:
    """Bring both databases, Headscope's and the job queue's, to the newest version."""
    settings = _settings(data=data).prepare()
    db = Database(settings.url)
    try:
        db.wait(settings.database_wait, _say, current=False)
        jobs.upgrade(settings, db)
    finally:
        db.close()
    _say(f"{settings.url!r} is up to date.")


@db_app.command(
    "search",
    epilog="Examples: [bold]headscope db search[/bold]; [bold]headscope db search dates[/bold]; "
    '[bold]headscope db search " tide" --sae mine --by token[/bold]',
)
def db_search(
    q: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for.", show_default="nothing")] = "",
    sae: Annotated[
        str | None, typer.Option("--sae", help="Only features of this SAE, a page of them.", show_default="everything")
    ] = None,
    by: Annotated[str, typer.Option("--by", help="With --sae: what it is.", metavar="|".join(search.KINDS))] = "label",
    data: Data = None,
) -> None:
    """Look for SAEs, features, labels and texts; without TEXT, make harvests searchable that were published before there was a
    search. Pages stay usable meanwhile."""
    if q:
        kind = search.check_kind(by)
        with _opened(_settings(data=data)) as (_, db), db.read() as session:
            if sae is None:
                rows = list(terminal.found_in_all(search.search_all(session, q)))
                _table(("what", "where", "found"), rows, f"Nothing here is '{q}'.")
                return
            found = search.search(session, find_sae(session, sae), q, kind)
        _table(
            ("feature", "label", "token", "strength", "family"),
            list(terminal.found(found)),
            found.trouble or f"Nothing is '{q}'.",
        )
        return
    with _opened(_settings(data=data)) as (_, db):
        with db.read() as session:
            waiting = search.lacking(session)
        for harvest_id, name in waiting:
            search.write(db, harvest_id, search.unfenced)
            _say(f"{name} can be searched.")
    if not waiting:
        _say("Every published harvest can be searched.")


@model_app.command(
    "add", epilog="Examples: [bold]headscope model add gpt2[/bold]; [bold]headscope model add mine ./llama.gguf[/bold]"
)
def model_add(
    name: Annotated[str, typer.Argument(help="Name to register it by.")],
    location: Annotated[str | None, typer.Argument(help="Hub name, folder or .gguf file.", show_default="the name")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    check: Annotated[bool, typer.Option(help="Load it, to see that its attention can be attributed.")] = True,
    data: Data = None,
) -> None:
    """Register a language model."""
    with _opened(_settings(data=data)) as (settings, db):
        _give_token(settings)
        source = _model_source(location or name, revision)
        info = _load(settings, name, source).info if check else None
        with db.write() as session:
            registry.add_model(session, name, source)
            if info:
                registry.note_shape(session, name, info)
        said = f": {info.n_layers} layers, {info.n_heads} heads of {info.d_head}" if info else ", not loaded yet"
        _say(f"{name} is registered{said}.")


@model_app.command("list")
def model_list(data: Data = None) -> None:
    """Models that are registered."""
    with _opened(_settings(data=data)) as (_, db), db.read() as session:
        rows = [(m.name, m.source.location, str(m.n_layers or "?"), str(m.n_heads or "?")) for m in registry.models(session)]
    _table(("name", "location", "layers", "heads"), rows, "No model is registered; `headscope model add` registers one.")


@corpus_app.command("add", epilog="Example: [bold]headscope corpus add pile hf:NeelNanda/pile-10k[/bold]")
def corpus_add(
    name: Annotated[str, typer.Argument(help="Name to register it by.")],
    location: Annotated[str, typer.Argument(help="A text, jsonl or parquet file, a folder of them, or hf:<data set>.")],
    field: Annotated[str, typer.Option("--field", help="Field or column that holds the text.")] = "text",
    split: Annotated[str, typer.Option("--split", help="Split of a hub data set.")] = "train",
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub data set.")] = None,
    data: Data = None,
) -> None:
    """Register a body of text. It stays where it is."""
    with _opened(_settings(data=data)) as (settings, db):
        _give_token(settings)
        source = CorpusSource(location=_corpus_location(location), field=field, split=split, revision=revision)
        _check_text(source)
        with db.write() as session:
            registry.add_corpus(session, name, source)
        _say(f"{name} is registered.")


@corpus_app.command("list")
def corpus_list(data: Data = None) -> None:
    """Corpora that are registered."""
    with _opened(_settings(data=data)) as (_, db), db.read() as session:
        rows = [(c.name, c.source.location, c.source.field) for c in registry.corpora(session)]
    _table(("name", "location", "field"), rows, "No corpus is registered; `headscope corpus add` registers one.")


@corpus_app.command(
    "remove-document",
    epilog="Examples: [bold]headscope corpus remove-document pile --file letter.txt[/bold]; "
    "[bold]headscope corpus remove-document pile --id 1204 --yes[/bold]",
)
def corpus_remove_document(
    name: Annotated[str, typer.Argument(help="The corpus, as `headscope corpus list` says it.")],
    text: Annotated[str | None, typer.Option("--text", help="Its text, or a part that tells it from others.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A file with that.")] = None,
    digest: Annotated[str | None, typer.Option("--hash", help="SHA-256 of its text, or at least its first 8 digits.")] = None,
    index: Annotated[int | None, typer.Option("--id", min=0, help="Its place in the corpus, from 0.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this only what would go is said.")] = False,
    data: Data = None,
) -> None:
    """Remove a document's text from harvests, search, rows and activations, and leave it out of all that is made later."""
    if sum(given_ is not None for given_ in (text, file, digest, index)) != 1:
        raise UsageError("Name the document by one of --text, --file, --hash and --id.", field="text")
    with _opened(_settings(data=data)) as (settings, db):
        with db.read() as session:
            source = registry.corpus(session, name).source
        asked = file.read_text() if file is not None else text
        found = removal.find(settings, db, name, removal.search(source, text=asked, digest=digest, index=index))
        for digest_, said in zip(found.hashes, found.texts, strict=True):
            _say(f"{digest_[:16]}  {len(said):,} characters: {' '.join(said.split())[:60]}")
        held = removal.remove(settings, db, found) if yes else found.held
    what = (
        f"{held.contexts:,} rows of text with {held.examples:,} examples, {held.studies} studies, {held.written} labels, notes "
        f"and the like, {len(found.folders)} folders ({room.gigabytes(found.bytes)}) of rows, activations and jobs' files"
    )
    if not yes:
        raise UsageError(f"This would take it out of {what}; add --yes.", field="yes")
    _say(f"It is taken out of {what}. Backups, exports and the corpus's own files are yours to see to.")


@app.command(
    epilog="Examples: [bold]headscope doctor --tokens 10000000 --expansion 16[/bold]; "
    "[bold]headscope doctor --model gpt2 --features 24576 --tokens 10000000 --measure[/bold]"
)
@takes(options(RowsConfig, skip=("seed",)), options(TrainConfig, skip=("model", "corpus", "site", "rows", "harvests", "seed")))
def doctor(
    model: Annotated[str, typer.Option("--model", help="A registered model, or a folder with a config.json.")] = "smollm2",
    layer: Annotated[int, typer.Option("--layer", help="Layer, for the estimate.")] = 17,
    features: Annotated[
        int | None, typer.Option("--features", min=1, help="Features of the SAE to plan a harvest of.", show_default="the run's")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and do a little of a harvest, to say how long one takes here.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    data: Data = None,
    **values: Any,
) -> None:
    """What is installed, what this machine can do, and what a run of a given size will need."""
    raw = {"model": model, "corpus": "any", "site": Site(layer=layer), "rows": given(values, RowsConfig)}
    cfg = built(TrainConfig, raw | given(values, TrainConfig))
    found = doctors.report(_settings(data=data), cfg, features=features, measure=measure)
    if as_json:
        console.print_json(json.dumps(found))
        return
    _table(None, doctors.lines(found), "")


# --------------------------------------------------------------------------------------------------------------- keeping


@app.command(
    "backup",
    epilog="Examples: [bold]headscope backup /mnt/backups/headscope --keep 14[/bold]; [bold]headscope backup before.tar[/bold]",
)
def backup_(
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder for many snapshots, or a new .tar file for one.")],
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="Leave so many snapshots in the folder.", show_default="all")
    ] = None,
    data: Data = None,
) -> None:
    """Take a snapshot of both databases and the files they refer to; web and workers may go on meanwhile."""
    with _opened(_settings(data=data)) as (settings, _):
        where, made = backup.backup(settings, target, keep=keep)
    for note in made.notes:
        _say(note)
    size = sum(int(about[1]) for about in (*made.databases.values(), *made.files.values()))
    rows = sum(made.counts[stored.OURS].values())
    _say(f"{where} holds {rows:,} rows and {len(made.files):,} files, {room.gigabytes(size)}.")


@app.command("restore", epilog="Example: [bold]headscope restore /mnt/backups/headscope --data ./new[/bold]")
def restore_(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder or the .tar file of a backup.")],
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", help="Which of the folder's snapshots.", show_default="the newest")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only see that it is whole.")] = False,
    data: Data = None,
) -> None:
    """Put a backup back, into an empty data folder and, of PostgreSQL, an empty database. Nothing is overwritten."""
    if check:
        whole = backup.verify(source, snapshot)
        _say(f"The backup of {whole.made_at} is whole: {len(whole.files):,} files.")
        return
    settings = _settings(data=data).prepare()
    made = backup.restore(settings, source, snapshot=snapshot)
    rows = sum(made.counts[stored.OURS].values())
    _say(f"{settings.data} holds what was backed up at {made.made_at}: {rows:,} rows, {len(made.files):,} files.")


@app.command(
    "migrate",
    epilog="Examples: [bold]headscope migrate postgresql+psycopg://headscope@db/headscope --password-file pw[/bold]; "
    "[bold]headscope migrate sqlite[/bold]",
)
def migrate_(
    to: Annotated[str, typer.Argument(metavar="TO", help="An empty PostgreSQL database; or `sqlite`, back into files.")],
    password_file: Annotated[
        Path | None, typer.Option("--password-file", help="File with the password for it.", show_default="none")
    ] = None,
    data: Data = None,
) -> None:
    """Copy both databases, jobs that wait included, from SQLite to PostgreSQL or back, and compare what was written."""
    with _opened(_settings(data=data)) as (settings, _):
        new = {"database_url": None if to == "sqlite" else to, "database_password_file": password_file}
        target = settings.model_copy(update=new)
        moved = migrate.migrate(settings, target, _say)
    rows = sum(n for n, _ in moved.tables.values())
    how = "unset HEADSCOPE_DATABASE_URL" if to == "sqlite" else "set HEADSCOPE_DATABASE_URL to that address"
    _say(f"{rows:,} rows of {len(moved.tables)} tables are the same in {target.url!r}. To use it, {how} and start everything.")


@app.command("gc", epilog="Examples: [bold]headscope gc[/bold]; [bold]headscope gc --days 7 --caches --yes[/bold]")
def gc_(
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this only what would go is said.")] = False,
    days: Annotated[
        float, typer.Option("--days", min=0, help="Keep so long what failed and cancelled jobs left, and logs.")
    ] = 30,
    caches: Annotated[
        bool, typer.Option("--caches", help="Also activation caches that no open job reads, and models not registered any more.")
    ] = False,
    data: Data = None,
) -> None:
    """Give back the disk of what nothing refers to: jobs' files, rows, SAEs, caches, what was half written, old logs."""
    with _opened(_settings(data=data)) as (settings, db):
        found = garbage.find(settings, db, days=days, caches=caches)
        if yes:
            found = garbage.collect(settings, db, found)
    lines = [(one.what, room.gigabytes(one.bytes) if one.path else "in the database", one.why) for one in found]
    _table(("what", "size", "why"), lines, "Nothing is left over.")
    if found:
        total = room.gigabytes(sum(one.bytes for one in found))
        _say(f"{total} are given back." if yes else f"{total} would be given back; add --yes.")


# --------------------------------------------------------------------------------------------------------------- helpers


@contextmanager
def _aside(apart: bool) -> Iterator[None]:
    """Say everything on stderr meanwhile, so that stdout holds nothing but what was asked for."""
    global console
    stdout = console
    console = Console(stderr=True, highlight=False) if apart else stdout
    try:
        yield
    finally:
        console = stdout


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)


def _table(heads: tuple[str, ...] | None, rows: Sequence[tuple[str, ...]], empty: str) -> None:
    if not rows:
        _say(empty)
        return
    columns = [Column(head, overflow="fold") for head in heads or ("", "")]
    table = Table(*columns, box=None, show_header=heads is not None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _settings(**chosen: Any) -> Settings:
    """Settings of the environment, with what was given on the command line."""
    try:
        return Settings(**{name: value for name, value in chosen.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise UsageError(f"HEADSCOPE_{name.upper()}={first['input']}: {first['msg']}.", field=name) from error


@contextmanager
def _opened(settings: Settings) -> Iterator[tuple[Settings, Database]]:
    """The data folder and its database, at the version that this code knows; a new SQLite file is made."""
    settings.prepare()
    db = Database(settings.url)
    try:
        path = sqlite_path(settings.url)
        if path is not None and not path.exists():
            jobs.upgrade(settings, db)
        else:
            db.wait(settings.database_wait, _say)
        yield settings, db
    finally:
        db.close()


def _give_token(settings: Settings) -> None:
    """Put the Hugging Face token where the hub's library looks for it."""
    if settings.hf_token_file is not None:
        os.environ["HF_TOKEN"] = read_secret(settings.hf_token_file, "hf_token_file")


def _watched(settings: Settings, process: str) -> None:
    """Let this process say what happens, as the settings ask for it."""
    import atexit

    from server import logs, telemetry

    logs.begin(settings, process)
    _at_the_end.append(telemetry.begin(settings, process))
    atexit.register(_at_the_end[-1])


_at_the_end: list[Callable[[], None]] = []
"""What sends the rest of the traces."""


def _leave(*_: object) -> NoReturn:
    """Leave at once and well: all is kept by now, and taking torch down takes seconds."""
    _last_words()
    os._exit(0)


def _last_words() -> None:
    for act in _at_the_end:
        act()
    logging.shutdown()
    sys.stdout.flush()


M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


def _share_heaps() -> None:
    """Let all threads share two heaps: else each keeps one of its own, as large as the largest page that it ever made."""
    with suppress(AttributeError, OSError):  # glibc's alone
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def _uvicorn(web: Any, settings: Settings, host: str, port: int, what: str, processes: int = 1) -> None:
    import uvicorn

    from server import forked

    # uvicorn lets go of everything at SIGTERM and then sends it to itself once more: that is no failure.
    signal.signal(signal.SIGTERM, _leave)
    listening = up.listen(host, port)
    _say(f"{what} at http://{host}:{port}.")
    gc.freeze()  # what is loaded by now stays; walking all of it again and again stalled a page in a hundred by 0.2 s
    gc.enable()
    gc.set_threshold(20_000, 20, 20)  # a page makes thousands of objects and leaves no cycles: looking for them took a twentieth
    config = uvicorn.Config(
        web,
        log_config=None,  # `logs.begin` has said how
        access_log=False,  # its lines show queries; ours do not
        timeout_graceful_shutdown=3,
        server_header=False,
        forwarded_allow_ips=settings.proxies,
    )
    if processes == 1:
        uvicorn.Server(config).run(sockets=[listening])
    else:

        def work() -> None:
            try:
                uvicorn.Server(config).run(sockets=[listening])
            finally:
                _last_words()  # SIGTERM has had them at `_leave`; SIGINT comes by here

        forked.keep(processes, work)


class _Found(Generic[S]):
    """A model or corpus that was asked for: registered, or to be registered under `name` once it is seen to be good."""

    def __init__(self, name: str, source: S, *, new: bool) -> None:
        self.name, self.source, self.new = name, source, new


def _find_model(db: Database, asked: str, revision: str | None) -> _Found[ModelSource]:
    with db.read() as session:
        known = {m.name: m for m in registry.models(session)}
        if asked in known and revision in (None, known[asked].source.revision):
            return _Found(asked, known[asked].source, new=False)
        source = _model_source(asked, revision)
        if same := registry.model_at(session, source):
            return _Found(same.name, source, new=False)
    return _Found(_free_name(asked, set(known)), source, new=True)


def _model_source(asked: str, revision: str | None) -> ModelSource:
    path = Path(asked).expanduser()
    if path.exists():
        return ModelSource(location=str(path.resolve()))
    if asked.endswith(".gguf") or asked.startswith((".", "/", "~")):
        raise UnknownModel(f"There is no model at {asked}; check the path.", field="model")
    return ModelSource(location=asked, revision=revision)


def _find_corpus(db: Database, asked: str) -> _Found[CorpusSource]:
    with db.read() as session:
        known = {c.name: c for c in registry.corpora(session)}
        if asked in known:
            return _Found(asked, known[asked].source, new=False)
        source = CorpusSource(location=_corpus_location(asked))
        if same := registry.corpus_at(session, source):
            return _Found(same.name, source, new=False)
    return _Found(_free_name(asked.removeprefix("hf:"), set(known)), source, new=True)


def _swept(db: Database, names: list[str], model: str | None) -> list[registry.SAERecord]:
    """The SAEs that are named, or all of a model."""
    if bool(names) == (model is not None):
        raise UsageError(
            "Say which SAEs to sweep: --sae names one and may be repeated, --model takes all of a model.", field="sae"
        )
    with db.read() as session:
        if model is None:
            return [registry.sae(session, name) for name in sorted(set(names))]
        found = registry.saes_of_model(session, registry.model(session, model).id)
    if not found:
        raise UsageError(f"{model} has no SAE yet; `headscope train` makes one.", field="model")
    return found


def _corpus_for(
    db: Database, record: registry.SAERecord, asked: str | None, what: str
) -> tuple[_Found[CorpusSource], RowsConfig | None]:
    """The text that is asked for, else the training's; and the training's rows where it is the same text."""
    trained = record.config.train
    if asked is None and trained is None:
        raise UsageError(f"{record.name} was not trained here, so say what text to {what} it on: --corpus.", field="corpus")
    found = _find_corpus(db, asked or (trained.corpus if trained else ""))
    return found, trained.rows if trained and trained.corpus == found.name else None


def _corpus_location(asked: str) -> str:
    if asked.startswith("hf:"):
        return asked
    path = Path(asked).expanduser()
    if not path.exists():
        raise UnknownCorpus(
            f"No corpus is registered as {asked}, and there is no file or folder of that name; "
            "check the path, or write hf:<name> for a data set on the hub.",
            field="corpus",
        )
    return str(path.resolve())


def _free_name(asked: str, taken: set[str]) -> str:
    base = slug(Path(asked).stem if asked.endswith((".gguf", ".txt", ".jsonl", ".parquet")) else asked)
    return next(name for n in range(1, 10**6) if (name := base if n == 1 else f"{base}-{n}") not in taken)


def _check_text(source: CorpusSource) -> None:
    from sae_core.corpus import documents

    if next(documents(source), None) is None:
        raise EmptyCorpus(f"There is no text in {source.location}; add some, or name another corpus.", field="corpus")


def _load(settings: Settings, name: str, source: ModelSource) -> "Lens":
    doctors.need_worker_extra()
    from sae_core import machine
    from sae_core.lens import load_lens

    return load_lens(source, name=name, device=machine.pick_device(settings.device), cache=settings.cache)


def _register(db: Database, model: _Found[ModelSource], corpus: _Found[CorpusSource]) -> None:
    if corpus.new:
        _check_text(corpus.source)
    with db.write() as session:
        registry.add_model(session, model.name, model.source)
        registry.add_corpus(session, corpus.name, corpus.source)


def _training(
    values: dict[str, Any],
    preset: str | None,
    config: Path | None,
    harvest_tokens: list[int] | None,
    model: str,
    corpus: str,
) -> dict[str, Any]:
    """The fields of a training config: of the preset, over them those of the config file, over them those of the options."""
    chosen = _config_file(config) | given(values, TrainConfig)
    raw = _preset(preset, chosen.get("arch")) | chosen
    raw["rows"] = raw.get("rows", {}) | given({**values, "seed": values["rows_seed"]}, RowsConfig)
    raw |= {key: value for key, value in (("model", model), ("corpus", corpus)) if value}
    _harvests(raw, harvest_tokens, given(values, HarvestConfig, prefix="harvest-"))
    return raw


def _preset(name: str | None, arch: str | None) -> dict[str, Any]:
    """A preset's fields; those that another architecture, asked for beside it, does not read are left out."""
    if name is None:
        return {}
    if name not in PRESETS:
        raise UsageError(f"There is no preset {name}; there are {', '.join(PRESETS)}.", field="preset")
    fields = PRESETS[name]
    return {key: value for key, value in fields.items() if arch is None or arch in BELONGS.get(key, (arch,))}


def _harvests(raw: dict[str, Any], tokens: list[int] | None, shared: dict[str, Any]) -> None:
    """Put the harvests that the options ask for into the config."""
    if tokens is not None:
        raw["harvests"] = [{"tokens": n} for n in tokens if n]
    if shared:
        raw["harvests"] = [dict(one) | shared for one in raw.get("harvests", [{}])]


def _config(raw: dict[str, Any], listed: dict[str, Any]) -> TrainConfig | SweepConfig:
    """The config of one run or, where something is `listed`, of many.

    What only some architectures read goes to these, when several are asked for: the others would refuse it.
    """
    if not listed:
        return built(TrainConfig, raw, FLAGS)
    archs = listed.get("archs", ())
    each: dict[str, dict[str, Any]] = {}
    if archs:
        special = {name: raw[name] for name in BELONGS if name in raw}
        for name in special:
            if not set(BELONGS[name]) & set(archs):
                flag = name.replace("_", "-")
                raise UsageError(
                    f"--{flag} is read by {' and '.join(BELONGS[name])} only, and --archs names none of them; leave it out.",
                    field=flag,
                )
        own = {arch: {name: value for name, value in special.items() if arch in BELONGS[name]} for arch in archs}
        each = {arch: fields for arch, fields in own.items() if fields}
        raw = {name: value for name, value in raw.items() if name not in special}
        raw["arch"] = next((arch for arch in archs if arch in get_args(Arch)), TrainConfig.model_fields["arch"].default)
    base = built(TrainConfig, {"site": {"layer": 0}} | raw, FLAGS)
    return built(SweepConfig, {"base": base, "each": each, **listed}, FLAGS)


def _config_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path} cannot be read as JSON ({error}).", field="config") from error
    if not isinstance(read, dict):
        raise UsageError(f"--config {path} holds no JSON object; a job's page shows one.", field="config")
    return read


# ---- training, here or in a worker ----


def _train(
    settings: Settings,
    raw: dict[str, Any],
    listed: dict[str, Any],
    wishes: Wishes,
    *,
    name: str | None,
    revision: str | None,
    watch: bool,
) -> None:
    """Queue what the options ask for, or do it here when no worker runs."""
    wanted = (raw.get("model", ""), raw.get("corpus", ""))
    if not wanted[0] or not wanted[1] or ("site" not in raw and "layers" not in listed):
        raise UsageError("Say what to train on: --model, --layer and --corpus; `headscope train --help` has examples.")
    _config(raw | {"model": "checked-later", "corpus": "checked-later"}, listed)

    with _opened(settings) as (settings, db):
        _give_token(settings)
        model, corpus = _find_model(db, wanted[0], revision), _find_corpus(db, wanted[1])
        cfg = _config(raw | {"model": model.name, "corpus": corpus.name}, listed)
        queue = Jobs(settings, db, wishes)
        if not queue.worker_alive():
            _allow_wandb(settings)
            _train_here(settings, db, cfg, wishes, name, model, corpus)
            return
        if "processes" in settings.model_fields_set and "HEADSCOPE_PROCESSES" not in os.environ:
            raise UsageError(
                "A worker runs, and it trains in as many processes as it was started with; "
                "start it with --processes, or stop it to train here.",
                field="processes",
            )
        if settings.wandb and "HEADSCOPE_WANDB" not in os.environ:
            raise UsageError(
                "A worker runs and would do this; name the project to it: HEADSCOPE_WANDB=<project> headscope worker.",
                field="wandb",
            )
        _register(db, model, corpus)
        job_id = _enqueue(queue, cfg, name)
        _say(f"Queued {job_id}.")
        if watch:
            _end(db, _watch_here(db, job_id))


def _enqueue(queue: Jobs, cfg: TrainConfig | SweepConfig, name: str | None) -> str:
    return queue.enqueue_train(cfg, name=name) if isinstance(cfg, TrainConfig) else queue.enqueue_sweep(cfg, name=name)


def _train_here(
    settings: Settings,
    db: Database,
    cfg: TrainConfig | SweepConfig,
    wishes: Wishes,
    name: str | None,
    model: _Found[ModelSource],
    corpus: _Found[CorpusSource],
) -> None:
    """Check everything that can be wrong before a line is written, then work until every SAE is published."""
    doctors.need_worker_extra()
    _check_text(corpus.source)
    if shape := _shape_before(db, model):
        jobs.check_shape(model.name, shape, _runs(cfg, shape.n_layers or 1))
    lens = _load(settings, model.name, model.source)
    info = lens.info
    runs = _runs(cfg, info.n_layers)
    for run in runs:
        lens.check_layer(run.site.layer)
        run.check_width(info.d_in)
    shape = estimates.Shape(info.d_model, info.n_layers, info.n_heads, info.d_head, info.d_vocab)
    need = doctors.sweep_needs(runs, shape, estimates.UNKNOWN)
    room.need_room(settings, need.disk)
    _register(db, model, corpus)
    with db.write() as session:
        registry.note_shape(session, model.name, info)
    if len(runs) > 1:
        _say(f"{len(runs)} SAEs, which take about {room.gigabytes(need.disk)} of disk while they are made.")
    job_id = _enqueue(Jobs(settings, db, wishes), cfg, name)
    _work_here(settings, db, job_id, warm=(model.name, lens))


def _shape_before(db: Database, model: _Found[ModelSource]) -> jobs.Shape | None:
    """What is known of the model without its weights: by an earlier load, or by its config."""
    from sae_core.sizes import read_sizes

    with db.read() as session:
        known = {m.name: m for m in registry.models(session)}.get(model.name)
    if known is not None and known.n_layers is not None:
        return known
    try:
        return read_sizes(model.source.location, revision=model.source.revision)
    except HeadscopeError:  # a GGUF file, or a config that is not here yet: loading it will tell
        return None


def _runs(cfg: TrainConfig | SweepConfig, n_layers: int) -> tuple[TrainConfig, ...]:
    return (cfg,) if isinstance(cfg, TrainConfig) else cfg.runs(n_layers)


# ---- running a job in this process ----


def _work_here(settings: Settings, db: Database, job_id: str, warm: "tuple[str, Lens] | None" = None) -> None:
    from server.worker import Worker

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    here = Worker(settings, db)
    if warm:
        here.keep(*warm)
    here.start()
    try:
        terminal.watch(db, job_id, console, stop)
    finally:
        here.close()
    if stop.is_set():
        _say(f"Stopped. `headscope worker` goes on with {job_id} where it is.")
        raise typer.Exit(130)
    _end(db, job_id)


def _watch_here(db: Database, job_id: str) -> str:
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    terminal.watch(db, job_id, console, stop)
    return job_id


def _end(db: Database, job_id: str) -> None:
    """Say how it ended; a failure is an error of this command."""
    for job in terminal.family(db, job_id):
        if job.status == "failed":
            raise HeadscopeError(f"{job.id} failed: {job.error}")
        if not job.ended:
            _say(f"{job.id} goes on without us.")
            return
        _say(f"{job.id} is {job.status}.")
        if job.kind == "sweep":
            _compare(db, job.id)
    _say("See it with `headscope up`.")


def _compare(db: Database, job_id: str) -> None:
    """A sweep's table."""
    with db.read() as session:
        record = sweeps.sweep(session, job_id)

    def kept(run: sweeps.SweepRun, against: str) -> str:
        found = run.kept.get(f"prose ce {against}")
        if found is None or found.value is None:
            return "withheld" if found else ""
        return f"{found.value:.1%}" + ("" if found.low is None else f" ({found.low:.0%} to {found.high:.0%})")

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        (
            run.label or run.sae,
            figure(run.l0, ".1f"),
            figure(run.fvu, ".1%"),
            kept(run, "zero"),
            kept(run, "mean"),
            figure(run.dead, ".1%"),
            figure(run.gamma, ".3f"),
            figure(run.rate, ",.0f"),
        )
        for run in record.runs
    ]
    heads = ("SAE", "L0", "unexplained", "CE kept of z = 0", "of z = mean", "dead", "gamma", "tokens/s")
    _table(heads, rows, "")


def _environment() -> None:
    """Nothing that runs here reports to anybody. Set before the libraries that read it are imported."""
    global _wandb_mode
    _wandb_mode = os.environ.get("WANDB_MODE")
    os.environ.update({"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"})
    if not os.environ.get("HEADSCOPE_WANDB"):
        os.environ["WANDB_MODE"] = "disabled"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    jobs.quiet()
    logging.captureWarnings(True)


_wandb_mode: str | None = None  # as a person set it


def _allow_wandb(settings: Settings) -> None:
    """Take our ban off where a project is named; what a person set stays."""
    if settings.wandb:
        tracking.need_wandb()
        os.environ.pop("WANDB_MODE", None)
        os.environ.update({"WANDB_MODE": _wandb_mode} if _wandb_mode else {})


def main() -> None:
    """Run a command; every error that a person can mend is one sentence."""
    _environment()
    up.die_with_parent()
    try:
        app()
    except HeadscopeError as error:
        _refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except sa.exc.OperationalError as error:
        if "disk is full" in str(error.orig):
            _refuse(DiskFull(f"No room is left for the database ({error.orig}); free some space and try again."))
        hint = "see whether its disk is full" if "disk I/O" in str(error.orig) else "see HEADSCOPE_DATABASE_URL"
        _refuse(DatabaseAway(f"The database does not answer ({error.orig}); {hint}."))
    except OSError as error:
        _refuse(_machine_error(error))


def _machine_error(error: OSError) -> MachineError:
    where = error.filename or "the data folder"
    if error.errno in (27, 28, 122):
        return DiskFull(f"No room is left for {where}; free some space, or set HEADSCOPE_DATA to another disk.")
    if error.errno in (1, 13, 30):
        return DataFolderNotWritable(f"{where} cannot be written ({error.strerror}); set HEADSCOPE_DATA to a folder of yours.")
    raise error


def _refuse(error: HeadscopeError) -> NoReturn:
    typer.echo(f"headscope: {error}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
