"""What is installed, what this machine can do, which models can be loaded, and what a run will need. No torch at import."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from sae_core.config import HarvestConfig, ModelSource, TrainConfig
from sae_core.errors import HeadscopeError, MissingWorkerExtra, UnknownModel
from server import estimates, harvest_plan, memory
from server.db import Database
from server.keeping.room import free_on, gigabytes
from server.settings import Settings
from server.store import jobs, registry
from server.terminal import duration

if TYPE_CHECKING:
    from sae_core.rates import HarvestRates
    from sae_core.sizes import ModelSizes


@dataclass(frozen=True)
class Need:
    """What a run will take."""

    seconds: dict[str, float]
    disk: float
    """Bytes in the data folder while it runs."""
    memory: float
    """Bytes of memory, beside the model."""


def has_worker_extra() -> bool:
    """Whether torch and TransformerLens are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformer_lens"))


def need_worker_extra() -> None:
    """Raise unless they are."""
    if not has_worker_extra():
        raise MissingWorkerExtra(
            "This needs torch and TransformerLens, which are not installed here; run `pip install 'headscope[worker]'`."
        )


def report(
    settings: Settings, cfg: TrainConfig | None, *, probe: bool = True, features: int | None = None, measure: bool = False
) -> dict[str, Any]:
    """Everything, as plain data. The harvest that is planned is of an SAE of `features`, else of the config's; `measure`: its
    times are read off a little of one, made here with the model."""
    found: dict[str, Any] = {"worker_extra": has_worker_extra(), "data": str(settings.data), "cache": str(settings.cache)}
    free = free_on(settings.data)
    found["disk_free"] = free
    speed = estimates.UNKNOWN
    if found["worker_extra"]:
        found |= machine_facts(settings, probe=probe)
        if probe:
            speed = estimates.Speed(found["speeds"]["float32"], found["speeds"]["bfloat16"])
    found["database"], found["models"], found["workers"] = _database(settings)
    if cfg is not None:
        sizes = _sizes(settings, cfg.model) if found["worker_extra"] else None
        need = needs(cfg, _shape(settings, cfg.model) if sizes is None else estimates.Shape.of(sizes), speed)
        found["run"] = {"seconds": need.seconds, "disk": need.disk, "memory": need.memory}
        found["harvest"] = _harvest(settings, cfg, sizes, speed, features, measure)
        if found["worker_extra"]:
            found["memory"] = memory_plans(cfg, sizes, speed)
    return found


def _harvest(
    settings: Settings,
    cfg: TrainConfig,
    sizes: "ModelSizes | None",
    speed: estimates.Speed,
    features: int | None,
    measure: bool,
) -> dict[str, Any]:
    """The plan of a harvest of all the run's tokens."""
    shape = _shape(settings, cfg.model) if sizes is None else estimates.Shape.of(sizes)
    d_sae = features or cfg.expansion * shape.d_in
    how = (cfg.harvests[0] if cfg.harvests else HarvestConfig()).model_copy(update={"tokens": cfg.rows.tokens})
    of_model = shape.d_in, shape.d_model, shape.n_heads, shape.d_vocab
    size = harvest_plan.Size(cfg.rows.tokens, cfg.rows.context, d_sae, cfg.k, *of_model)
    rates = _measured(settings, cfg, d_sae, how) if measure else None
    plan = harvest_plan.harvest_plan(how, size, rates)
    swept = [estimates.Swept(cfg.site.layer, d_sae, cfg.k)]
    seconds = plan.seconds or estimates.harvest_seconds(how, swept, cfg.rows, shape, speed, cached=False)
    return {
        "features": d_sae,
        "tokens": cfg.rows.tokens,
        "measured": measure,
        "seconds": seconds,
        "disk": plan.disk,
        "memory": plan.memory,
    }


def _measured(settings: Settings, cfg: TrainConfig, d_sae: int, how: HarvestConfig) -> "HarvestRates":
    """The speeds of a harvest's parts, from doing a little of each with the model."""
    need_worker_extra()
    from sae_core import machine
    from sae_core.lens import load_lens
    from sae_core.rates import harvest_rates

    source = ModelSource(location=cfg.model)
    if not (Path(cfg.model) / "config.json").is_file():
        db = Database(settings.url)
        try:
            with db.read() as session:
                source = registry.model(session, cfg.model).source
        except sa.exc.SQLAlchemyError as error:
            raise UnknownModel(f"No model is registered as {cfg.model}; name a folder or register one.", field="model") from error
        finally:
            db.close()
    device = machine.pick_device(settings.device)
    lens = load_lens(source, name=cfg.model, device=device, cache=settings.cache)
    lens.check_layer(cfg.site.layer)
    return harvest_rates(lens, cfg.site.layer, d_sae, cfg.k, cfg.rows.context, how)


def memory_plans(cfg: TrainConfig, known: "ModelSizes | None", speed: estimates.Speed) -> list[dict[str, Any]]:
    """What the run will hold on a device, part by part: with the config's model where its sizes are known, and with one of
    2B parameters on a GPU."""
    from sae_core.sizes import EXAMPLE, example_sizes

    # A GPU of today multiplies bfloat16 faster, so there `auto` means it; here it is what was measured.
    planned = [(EXAMPLE, example_sizes(), "on a GPU", True)]
    if known:
        planned.insert(0, (cfg.model, known, "here", speed.bfloat16 >= 1.5 * speed.float32))
    plans = []
    for name, sizes, where, faster in planned:
        halves = [faster if choice == "auto" else choice == "bfloat16" for choice in (cfg.model_dtype, cfg.step_dtype)]
        plan = memory.plan(cfg, sizes, half_pass=halves[0], half_step=halves[1])
        peaks = {"peak": plan.peak, "peak_all": plan.peak_all}
        plans.append({"model": name, "where": where, "sizes": sizes._asdict(), "parts": vars(plan), **peaks})
    return plans


def _sizes(settings: Settings, model: str) -> "ModelSizes | None":
    """A model's sizes by its config, read without its weights; None where there is no config at hand.

    Raises UnreadableModel where the model is named by its folder and the config.json there says nothing.
    """
    from sae_core.sizes import read_sizes

    place = _config_place(settings, model)
    if place is None:
        return None
    try:
        return read_sizes(place[0], revision=place[1])
    except HeadscopeError:
        if place[0] == model:
            raise
        return None  # registered, and its files are gone or not fetched yet


def _config_place(settings: Settings, model: str) -> tuple[str, str | None] | None:
    """Where a model's config can be read, and in which revision: a folder, the registered place, or a gguf's conversion."""
    if (Path(model) / "config.json").is_file():
        return model, None
    if settings.database_url is None and not (settings.data / "headscope.db").exists():
        return None
    db = Database(settings.url)
    try:
        with db.read() as session:
            m = registry.model(session, model)
    except (HeadscopeError, sa.exc.SQLAlchemyError):
        return None  # a plan needs neither database nor model
    finally:
        db.close()
    if m.source.location.endswith(".gguf"):
        digest = (m.fingerprint or "").removeprefix("gguf:")
        folder = settings.cache / "models" / digest
        return (str(folder), None) if digest and folder.is_dir() else None
    return m.source.location, m.source.revision


def machine_facts(settings: Settings, *, probe: bool) -> dict[str, Any]:
    """Versions, devices and measured speeds."""
    from sae_core import machine

    facts: dict[str, Any] = {
        "versions": machine.versions(),
        "devices": [vars(device) for device in machine.devices()],
        "cpu_features": machine.cpu_features(),
    }
    if probe:
        facts["device"] = machine.pick_device(settings.device)
        facts["speeds"] = machine.speeds(facts["device"])
    return facts


def sweep_needs(runs: Sequence[TrainConfig], shape: estimates.Shape, speed: estimates.Speed) -> Need:
    """The same of many runs on one stream: a pool for each layer, and for each run its parameters and checkpoints; of these
    one run's are in memory at a time."""
    each = [needs(run, shape, speed) for run in runs]
    layers = {run.site.layer for run in runs}
    shared = _pool_bytes(runs[0], shape, speed) + _row_bytes(runs[0])
    own = sum(need.disk - shared for need in each)
    disk = own + len(layers) * _pool_bytes(runs[0], shape, speed) + _row_bytes(runs[0])
    return Need(estimates.sweep_seconds(runs, shape, speed), disk, max(need.memory for need in each))


def needs(cfg: TrainConfig, shape: estimates.Shape, speed: estimates.Speed) -> Need:
    """Time, disk and memory of a training run with its harvests."""
    d_in, d_sae = shape.d_in, cfg.expansion * shape.d_in
    pools = _pool_bytes(cfg, shape, speed)
    parameters = 2 * d_in * d_sae * 4
    checkpoints = 3 * 3 * parameters  # values and two moments; two kept, one being written
    rows = _row_bytes(cfg)
    # parameters, gradients and moments; pre-activations of a batch in three places; one pool in the page cache
    memory = 4 * parameters + 3 * 4 * cfg.batch * d_sae + min(cfg.pool_tokens, cfg.rows.tokens) * d_in * _z_bytes(cfg, speed)
    return Need(estimates.train_seconds(cfg, shape, speed), pools + checkpoints + rows + 2 * parameters, memory)


def _pool_bytes(cfg: TrainConfig, shape: estimates.Shape, speed: estimates.Speed) -> float:
    """Of one layer: a run of its own holds a pool at a time, a cache with a name keeps them all."""
    tokens = cfg.rows.tokens if cfg.cache is not None else min(cfg.pool_tokens, cfg.rows.tokens)
    return tokens * shape.d_in * _z_bytes(cfg, speed)


def _z_bytes(cfg: TrainConfig, speed: estimates.Speed) -> int:
    """Bytes of a coordinate of z on disk."""
    halves = speed.bfloat16 >= 1.5 * speed.float32 if cfg.model_dtype == "auto" else cfg.model_dtype == "bfloat16"
    return 2 if halves else 4


def _row_bytes(cfg: TrainConfig) -> float:
    return 4 * (cfg.rows.tokens + cfg.rows.heldout_tokens)


def _database(settings: Settings) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Its state in words, its models and its live workers."""
    if settings.database_url is None and not (settings.data / "headscope.db").exists():
        return "none yet; any command that needs it makes it", [], []
    db = Database(settings.url)
    try:
        db.check_version()
        with db.read() as session:
            models = [
                {"name": m.name, "location": m.source.location, "layers": m.n_layers, "state": _loadable(m)}
                for m in registry.models(session)
            ]
            workers = [f"{w.id} on {w.device}" for w in jobs.workers(session, seen_within=20)]
        return f"{settings.url!r}, up to date", models, workers
    except HeadscopeError as error:
        return str(error), [], []
    finally:
        db.close()


def _loadable(model: registry.ModelRecord) -> str:
    location = Path(model.source.location)
    if location.is_absolute():
        if not location.exists():
            return "its file is gone"
        return "loads" if model.fingerprint else "there, not loaded yet"
    folder = Path(_hub_cache()) / f"models--{model.source.location.replace('/', '--')}"
    return "in the hub's cache" if folder.exists() else "to be fetched from the hub"


def _hub_cache() -> str:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return ""
    return HF_HUB_CACHE


def _shape(settings: Settings, model: str) -> estimates.Shape:
    """The model's sizes where they are known; else those of SmolLM2-135M."""
    db = Database(settings.url)
    try:
        with db.read() as session:
            m = registry.model(session, model)
        if m.d_model and m.n_layers and m.n_heads and m.d_head and m.d_vocab:
            return estimates.Shape(m.d_model, m.n_layers, m.n_heads, m.d_head, m.d_vocab)
    except (HeadscopeError, sa.exc.SQLAlchemyError):
        pass  # no database yet, or no such model: an estimate needs neither
    finally:
        db.close()
    return estimates.Shape(576, 30, 9, 64, 49152)


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The report for a terminal: what, and how it is."""
    said = [(name, version) for name, version in found.get("versions", {}).items()]
    if not found["worker_extra"]:
        said.append(("worker parts", "not installed: pages only; pip install 'headscope[worker]' for the rest"))
    said += [
        ("device", f"{d['name']}: {d['label']}, {gigabytes(d['free'])} of {gigabytes(d['memory'])} free")
        for d in found.get("devices", [])
    ]
    if found.get("cpu_features"):
        said.append(("CPU features", ", ".join(found["cpu_features"])))
    said += [(f"{name} product", f"{value / 1e9:,.0f} GFLOP/s") for name, value in found.get("speeds", {}).items()]
    if "speeds" in found:
        faster = found["speeds"]["bfloat16"] >= 1.5 * found["speeds"]["float32"]
        said.append(
            ("model passes", "bfloat16 (clearly faster here)" if faster else "float32 (bfloat16 is not clearly faster here)")
        )
    said += [("data folder", f"{found['data']}, {gigabytes(found['disk_free'])} free"), ("cache folder", found["cache"])]
    said.append(("database", found["database"]))
    said += [("model", f"{m['name']}: {m['location']} ({m['state']})") for m in found["models"]]
    said.append(("workers", ", ".join(found["workers"]) or "none running"))
    if "run" in found:
        run = found["run"]
        phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in run["seconds"].items())
        said.append(("such a run", f"about {duration(sum(run['seconds'].values()))} ({phases})"))
        said.append(("it needs", f"{gigabytes(run['disk'])} of disk, {gigabytes(run['memory'])} of memory beside the model"))
    if "harvest" in found:
        said += _harvest_lines(found["harvest"])
    for plan in found.get("memory", []):
        said += _plan_lines(plan, found["devices"])
    return said


def _harvest_lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """A harvest's plan: how long, and where its disk goes."""
    phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in plan["seconds"].items())
    how = "as a little of one takes here" if plan["measured"] else "roughly; --measure says it for this machine"
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in plan["disk"].items())
    return [
        ("such a harvest", f"{plan['features']:,} features over {plan['tokens']:,} tokens"),
        ("  it takes", f"{duration(sum(plan['seconds'].values()))}, {how} ({phases})"),
        ("  it needs", f"{gigabytes(sum(plan['disk'].values()))} of disk ({parts})"),
        ("", f"{gigabytes(max(plan['memory'].values()))} of memory beside the model"),
    ]


def _plan_lines(plan: dict[str, Any], devices: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A memory plan: its parts, and whether they fit."""
    parts, n_layers = plan["parts"], plan["sizes"]["n_layers"]
    said = [("memory plan", f"{plan['model']}, {plan['sizes']['parameters'] / 1e9:,.2f}B parameters, {plan['where']}")]
    for name in ("model", "collecting", "training", "measuring", "visiting"):
        held = ", ".join(f"{part} {gigabytes(size)}" for part, size in parts[name].items() if size)
        said.append((f"  {name}", held))
    said[2] = (said[2][0], f"{said[2][1]} from one layer, {gigabytes(parts['all_layers'])} from all {n_layers}")
    gpus = [device for device in devices if device["name"] != "cpu"]
    fitting = gpus[:1] if plan["where"] != "here" or gpus else devices[:1]
    peak = f"{gigabytes(plan['peak'])}, with all layers in one pass {gigabytes(plan['peak_all'])}"
    for device in fitting:
        fits = "fits into" if 1.1 * plan["peak_all"] <= device["free"] else "is too much for"
        peak += f"; {fits} the {gigabytes(device['free'])} free on {device['name']}"
    return [*said, ("  at most", peak)]
