"""Commands that look after the databases and the data folder: upgrade, search, backup, restore, migrate, gc."""

from pathlib import Path
from typing import Annotated

import typer

from server import jobs, terminal
from server.commands.arguments import Data
from server.commands.opened import opened, settings_with
from server.commands.printing import say, table
from server.db import Database
from server.keeping import room
from server.store import search
from server.store.saes import find_sae

app = typer.Typer()
db_app = typer.Typer(help="The database.", no_args_is_help=True)


@db_app.command("upgrade", epilog="Example: [bold]headscope db upgrade[/bold]")
def db_upgrade(data: Data = None) -> None:
    """Bring both databases, Headscope's and the job queue's, to the newest version."""
    settings = settings_with(data=data).prepare()
    db = Database(settings.url)
    try:
        db.wait(settings.database_wait, say, current=False)
        jobs.upgrade(settings, db)
    finally:
        db.close()
    say(f"{settings.url!r} is up to date.")


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
        with opened(settings_with(data=data)) as (_, db), db.read() as session:
            if sae is None:
                rows = list(terminal.found_in_all(search.search_all(session, q)))
                table(("what", "where", "found"), rows, f"Nothing here is '{q}'.")
                return
            found = search.search(session, find_sae(session, sae), q, kind)
        table(
            ("feature", "label", "token", "strength", "family"),
            list(terminal.found(found)),
            found.trouble or f"Nothing is '{q}'.",
        )
        return
    with opened(settings_with(data=data)) as (_, db):
        with db.read() as session:
            waiting = search.lacking(session)
        for harvest_id, name in waiting:
            search.write(db, harvest_id, search.unfenced)
            say(f"{name} can be searched.")
    if not waiting:
        say("Every published harvest can be searched.")


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
    from server.keeping import backup, stored

    with opened(settings_with(data=data)) as (settings, _):
        where, made = backup.backup(settings, target, keep=keep)
    for note in made.notes:
        say(note)
    size = sum(int(about[1]) for about in (*made.databases.values(), *made.files.values()))
    rows = sum(made.counts[stored.OURS].values())
    say(f"{where} holds {rows:,} rows and {len(made.files):,} files, {room.gigabytes(size)}.")


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
    from server.keeping import backup, stored

    if check:
        whole = backup.verify(source, snapshot)
        say(f"The backup of {whole.made_at} is whole: {len(whole.files):,} files.")
        return
    settings = settings_with(data=data).prepare()
    made = backup.restore(settings, source, snapshot=snapshot)
    rows = sum(made.counts[stored.OURS].values())
    say(f"{settings.data} holds what was backed up at {made.made_at}: {rows:,} rows, {len(made.files):,} files.")


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
    from server.keeping import migrate

    with opened(settings_with(data=data)) as (settings, _):
        new = {"database_url": None if to == "sqlite" else to, "database_password_file": password_file}
        target = settings.model_copy(update=new)
        moved = migrate.migrate(settings, target, say)
    rows = sum(n for n, _ in moved.tables.values())
    how = "unset HEADSCOPE_DATABASE_URL" if to == "sqlite" else "set HEADSCOPE_DATABASE_URL to that address"
    say(f"{rows:,} rows of {len(moved.tables)} tables are the same in {target.url!r}. To use it, {how} and start everything.")


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
    from server.keeping import gc as garbage

    with opened(settings_with(data=data)) as (settings, db):
        found = garbage.find(settings, db, days=days, caches=caches)
        if yes:
            found = garbage.collect(settings, db, found)
    lines = [(one.what, room.gigabytes(one.bytes) if one.path else "in the database", one.why) for one in found]
    table(("what", "size", "why"), lines, "Nothing is left over.")
    if found:
        total = room.gigabytes(sum(one.bytes for one in found))
        say(f"{total} are given back." if yes else f"{total} would be given back; add --yes.")
