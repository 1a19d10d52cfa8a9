"""Commands that take in what others made, and write what others read."""

import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_core.config import DashboardsJob, ImportJob, TranscoderFiles, Wishes
from sae_core.errors import UsageError
from server import doctor as doctors
from server.commands.arguments import OF_JOB, Data, Device, LanguageModel, Watch
from server.commands.environment import give_token
from server.commands.opened import opened, settings_with
from server.commands.printing import say
from server.commands.running import carry_out, look_for_worker
from server.commands.sources import find_model, load_model
from server.jobs import Jobs, slug
from server.keeping import room
from server.options import built, given, options, takes
from server.store import registry, stored_harvests, transcoders
from server.store.saes import find_sae

import_app = typer.Typer(help="SAEs, transcoders and dashboards that others made.", no_args_is_help=True)
export_app = typer.Typer(help="SAEs and harvests, in the forms that others read.", no_args_is_help=True)


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
    with opened(settings_with(data=data, device=device)) as (settings, db):
        give_token(settings)
        found = find_model(db, model, None)
        cfg = built(ImportJob, raw | {"model": found.name})
        queue = Jobs(settings, db, built(Wishes, given(values, Wishes)))
        alive = look_for_worker(queue)
        with db.write() as session:
            registry.add_model(session, found.name, found.source)
        job_id = queue.enqueue_import(cfg, name=name)
        carry_out(settings, db, job_id, alive=alive, watch=watch)


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
    with opened(settings_with(data=data, device=device)) as (settings, db):
        give_token(settings)
        peer, found = open_transcoder(fetched(location, said.revision), said.format), find_model(db, model, None)
        with db.read() as session:
            transcoders.check_free(session, found.name, peer.layer if said.layer is None else said.layer, replace=replace)
        lens = load_model(settings, found.name, found.source)
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
    say(
        f"Layer {cfg.layer} of {found.name} has a transcoder of {made.n_features:,} features; it reads {cfg.reads}, writes "
        f"{cfg.writes}. On a short text {fit.l0:.0f} features fire a token, and {fit.fvu:.0%} of the variance of what the MLP "
        "adds is left."
    )
    for other, fvu in fit.otherwise.items():
        if fvu < 0.7 * fit.fvu:
            say(f"With --reads {other} {fvu:.0%} would be left: see what it was trained on.")


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
    with opened(settings_with(data=data)) as (settings, db):
        dashboards.look(folder)  # what is wrong with the folder is said before anything is queued
        queue = Jobs(settings, db, built(Wishes, given(values, Wishes)))
        alive = look_for_worker(queue)
        job_id = queue.enqueue_dashboards(cfg)
        with db.read() as session:
            there = stored_harvests.n_made_by(session, job_id) > 0
        job = queue.get(job_id)
        if job.status == "done" and there:
            say(f"{job_id} is done already; `headscope harvests list` shows what it made.")
            return
        if job.ended:
            queue.retry(job_id, even_done=True)
        carry_out(settings, db, job_id, alive=alive, watch=watch)


@export_app.command("sae", epilog="Example: [bold]headscope export sae gpt2-l5-1a2b3c ./for-saelens[/bold]")
def export_sae(
    sae: Annotated[str, typer.Argument(help="Name of the SAE.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    data: Data = None,
) -> None:
    """Write an SAE as a folder that SAELens 6 loads."""
    doctors.need_worker_extra()
    with opened(settings_with(data=data)) as (settings, db):
        with db.read() as session:
            record = registry.sae(session, sae)
        _need_empty(folder)
        from sae_core.formats import write_saelens
        from sae_core.saes import load_sae

        write_saelens(load_sae(settings.data / record.folder), folder)
    say(f"{sae} is in {folder}; SAE.load_from_disk({str(folder)!r}) reads it.")


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

    if form not in ("saedashboard", "neuronpedia", "delphi"):
        raise UsageError(f"There is no form {form}; there are saedashboard, neuronpedia and delphi.", field="form")
    with opened(settings_with(data=data)) as (_, db):
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
    say(f"{wrote.features:,} features with {wrote.examples:,} examples are in {folder} ({room.gigabytes(size)}).")


@export_app.command("html", epilog="Example: [bold]headscope export html 3 ./for-the-appendix[/bold]")
def export_html(
    list_id: Annotated[int, typer.Argument(metavar="LIST", help="Number of a feature list, as its address says it.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    data: Data = None,
) -> None:
    """Write a list of features as pages that open from disk."""
    from server.exchange import bundle
    from server.store.lists import list_page

    with opened(settings_with(data=data)) as (_, db), db.read() as session:
        listed = list_page(session, list_id)
        _need_empty(folder)
        n = bundle.write(session, listed, folder)
    say(f"{n} features are in {folder}; open {folder / 'index.html'}.")


def _need_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; name a new folder.", field="folder")
