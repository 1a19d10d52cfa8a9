"""The command that harvests, and those for harvests that are stored."""

from typing import Annotated, Any

import typer

from sae_core.config import HarvestConfig, HarvestJob, RowsConfig, Wishes
from sae_core.errors import UsageError
from server.commands.arguments import OF_JOB, Data, Description, Device, NewName, Undo, or_kept
from server.commands.environment import give_token
from server.commands.opened import opened, settings_with
from server.commands.printing import say, table
from server.commands.running import carry_out, look_for_worker
from server.commands.sources import corpus_for
from server.db import Database
from server.jobs import Jobs
from server.options import built, given, options, takes
from server.store import manage, registry, stored_harvests

app = typer.Typer()
harvests_app = typer.Typer(help="Harvests that are stored.", no_args_is_help=True)


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
    with opened(settings_with(data=data, device=device)) as (settings, db):
        give_token(settings)
        records = _swept(db, saes or [], model)
        texts = [corpus_for(db, record, corpus, "sweep") for record in records]
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
        alive = look_for_worker(queue)
        with db.write() as session:
            registry.add_corpus(session, found.name, found.source)
        job_id = queue.enqueue_harvest(cfg)
        job = queue.get(job_id)
        with db.read() as session:
            there = stored_harvests.n_made_by(session, job_id) == len(cfg.saes)
        if job.status == "done" and there:
            say(f"{job_id} is done already: the same sweep would give the same numbers.")
            return
        if job.ended:
            queue.retry(job_id, even_done=True)
        carry_out(settings, db, job_id, alive=alive, watch=watch)


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


@harvests_app.command("list")
def harvests_list(data: Data = None) -> None:
    """Harvests that are stored: those that are shown, those that were replaced, those that are being written."""
    with opened(settings_with(data=data)) as (_, db), db.read() as session:
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
    table(names, rows, "Nothing has been harvested; `headscope harvest` does it.")


HarvestId = Annotated[int, typer.Argument(metavar="ID", help="As `headscope harvests list` says it.")]


@harvests_app.command("delete", epilog="Example: [bold]headscope harvests delete 3[/bold]")
def harvests_delete(
    harvest_id: HarvestId,
    force: Annotated[bool, typer.Option("--force", help="Even the one that the pages show.")] = False,
    data: Data = None,
) -> None:
    """Delete a stored harvest: its features and examples. Pages stay usable meanwhile."""
    with opened(settings_with(data=data)) as (_, db):
        stored_harvests.delete(db, harvest_id, force=force)
        say(f"Harvest {harvest_id} is deleted.")


@harvests_app.command("describe", epilog='Example: [bold]headscope harvests describe 3 --name "all of the corpus"[/bold]')
def harvests_describe(harvest_id: HarvestId, name: NewName = None, description: Description = None, data: Data = None) -> None:
    """Give a stored harvest a name and a description; what is not given stays."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        now = manage.harvest_line(session, harvest_id)
        manage.describe_harvest(session, harvest_id, or_kept(name, now.name), or_kept(description, now.description))
    say(f"Harvest {harvest_id} is described.")


@harvests_app.command("archive", epilog="Example: [bold]headscope harvests archive 3[/bold]")
def harvests_archive(harvest_id: HarvestId, undo: Undo = False, data: Data = None) -> None:
    """Move a stored harvest to the end of the lists; nothing of it is deleted."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        manage.archive_harvest(session, harvest_id, not undo)
    say(f"Harvest {harvest_id} is {'brought back' if undo else 'archived'}.")
