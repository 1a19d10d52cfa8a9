"""The command that measures an SAE that exists, and those that describe, archive, share and delete SAEs."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_core.config import EvaluateConfig, EvaluateJob, RowsConfig, Wishes
from sae_core.errors import UnknownCorpus, UsageError
from server import terminal
from server.commands.arguments import OF_JOB, Data, Description, Device, NewName, Undo, Watch, or_kept
from server.commands.environment import give_token
from server.commands.opened import opened, settings_with
from server.commands.printing import aside, say, say_json, table
from server.commands.running import carry_out, look_for_worker
from server.commands.sources import corpus_for
from server.jobs import Jobs
from server.options import built, given, options, takes
from server.store import accounts, manage, registry
from server.store.saes import find_sae

app = typer.Typer()
saes_app = typer.Typer(help="SAEs that are there.", no_args_is_help=True)


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
    with opened(settings_with(data=data, device=device)) as (settings, db), aside(as_json):
        give_token(settings)
        with db.read() as session:
            record = registry.sae(session, sae)
            for name in against or []:
                registry.sae(session, name)
        found, rows = corpus_for(db, record, corpus, "measure")
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
        alive = look_for_worker(queue)
        with db.write() as session:
            registry.add_corpus(session, found.name, found.source)
        job_id = queue.enqueue_evaluate(cfg)
        if not carry_out(settings, db, job_id, alive=alive, watch=watch or as_json):
            return
        with db.read() as session:
            metrics = registry.metrics(session, sae)
    if as_json:
        say_json(metrics)
    else:
        table(("measure", "value"), terminal.measures(metrics), "")


SaeName = Annotated[str, typer.Argument(metavar="SAE", help="As `headscope saes list` says it.")]


@saes_app.command("list")
def saes_list(data: Data = None) -> None:
    """SAEs that are there; archived ones last."""
    with opened(settings_with(data=data)) as (_, db), db.read() as session:
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
    table(names, rows, "There is no SAE; `headscope train` makes one.")


@saes_app.command(
    "describe", epilog='Example: [bold]headscope saes describe mine --name l17 --description "the best so far"[/bold]'
)
def saes_describe(sae: SaeName, name: NewName = None, description: Description = None, data: Data = None) -> None:
    """Give an SAE another name, which its former one still leads to, or a description; what is not given stays."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        door = find_sae(session, sae)
        called = manage.describe(session, door, or_kept(name, sae), or_kept(description, door.description))
    say(f"{sae} is {f'called {called} now' if called != sae else 'described'}.")


@saes_app.command("archive", epilog="Example: [bold]headscope saes archive mine[/bold]")
def saes_archive(sae: SaeName, undo: Undo = False, data: Data = None) -> None:
    """Leave an SAE out of the first page; its pages stay."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        manage.archive(session, find_sae(session, sae), not undo)
    say(f"{sae} is {'brought back' if undo else 'archived'}.")


@saes_app.command("visibility", epilog="Example: [bold]headscope saes visibility mine private --owner Ola[/bold]")
def saes_visibility(
    sae: SaeName,
    visibility: Annotated[str, typer.Argument(help="private, shared or public.")],
    owner: Annotated[str | None, typer.Option("--owner", help="Account that it belongs to from now on.")] = None,
    data: Data = None,
) -> None:
    """Say who sees an SAE, where there are accounts: its owner and admins, everybody with an account, or everybody."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        door = find_sae(session, sae)
        if owner is not None:
            manage.give(session, door, accounts.account_id(session, owner))
        manage.set_visibility(session, door, visibility)
        accounts.record(session, "set the visibility", sae)
    say(f"{sae} is {visibility}.")


@saes_app.command("delete", epilog="Example: [bold]headscope saes delete mine --yes[/bold]")
def saes_delete(
    sae: SaeName,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this only what would go is said.")] = False,
    data: Data = None,
) -> None:
    """Delete an SAE with its harvests, its weights and all that people wrote about it."""
    with opened(settings_with(data=data)) as (settings, db):
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
    say(f"{sae} is deleted.")
