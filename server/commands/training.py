"""Commands that make SAEs: `train` and `sweep`, here or by a worker."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from sae_core.config import (
    BELONGS,
    Arch,
    CorpusSource,
    HarvestConfig,
    ModelSource,
    RowsConfig,
    SweepConfig,
    TrainConfig,
    Wishes,
)
from sae_core.errors import HeadscopeError, UsageError
from sae_core.presets import PRESETS
from server import doctor as doctors
from server import estimates, jobs
from server.commands.arguments import OF_JOB, Data, Device, LanguageModel, Processes, Revision, Watch
from server.commands.environment import allow_wandb, give_token
from server.commands.opened import opened, settings_with
from server.commands.printing import say
from server.commands.running import watch_worker, work_here
from server.commands.sources import Found, check_text, find_corpus, find_model, load_model
from server.db import Database
from server.jobs import Jobs
from server.keeping import room
from server.options import built, given, options, takes
from server.settings import Settings
from server.store import registry

app = typer.Typer()

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
Layers = Annotated[
    str | None,
    typer.Option("--layers", metavar="<int>,...|all", help="Several layers, an SAE each; one model pass reads them all."),
]
Preset = Annotated[
    str | None, typer.Option("--preset", help="Published settings, such as kissane-gpt2-l5; options given here win.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A JSON file of a whole config; options given here win.")]
Wandb = Annotated[
    str | None, typer.Option("--wandb", help="Send the curves to this project of Weights & Biases.", show_default="nowhere")
]
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
    settings = settings_with(data=data, device=device, wandb=wandb, processes=processes)
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
    settings = settings_with(data=data, device=device, wandb=wandb, processes=processes)
    _train(settings, raw, listed, wishes, name=name, revision=revision, watch=watch)


# ---- what the options ask for ----


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

    with opened(settings) as (settings, db):
        give_token(settings)
        model, corpus = find_model(db, wanted[0], revision), find_corpus(db, wanted[1])
        cfg = _config(raw | {"model": model.name, "corpus": corpus.name}, listed)
        queue = Jobs(settings, db, wishes)
        if not queue.worker_alive():
            allow_wandb(settings)
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
        say(f"Queued {job_id}.")
        if watch:
            watch_worker(db, job_id)


def _enqueue(queue: Jobs, cfg: TrainConfig | SweepConfig, name: str | None) -> str:
    return queue.enqueue_train(cfg, name=name) if isinstance(cfg, TrainConfig) else queue.enqueue_sweep(cfg, name=name)


def _train_here(
    settings: Settings,
    db: Database,
    cfg: TrainConfig | SweepConfig,
    wishes: Wishes,
    name: str | None,
    model: Found[ModelSource],
    corpus: Found[CorpusSource],
) -> None:
    """Check everything that can be wrong before a line is written, then work until every SAE is published."""
    doctors.need_worker_extra()
    check_text(corpus.source)
    if shape := _shape_before(db, model):
        jobs.check_shape(model.name, shape, _runs(cfg, shape.n_layers or 1))
    lens = load_model(settings, model.name, model.source)
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
        say(f"{len(runs)} SAEs, which take about {room.gigabytes(need.disk)} of disk while they are made.")
    job_id = _enqueue(Jobs(settings, db, wishes), cfg, name)
    work_here(settings, db, job_id, warm=(model.name, lens))


def _shape_before(db: Database, model: Found[ModelSource]) -> jobs.Shape | None:
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


def _register(db: Database, model: Found[ModelSource], corpus: Found[CorpusSource]) -> None:
    if corpus.new:
        check_text(corpus.source)
    with db.write() as session:
        registry.add_model(session, model.name, model.source)
        registry.add_corpus(session, corpus.name, corpus.source)
