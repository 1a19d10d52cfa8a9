"""`headscope`: the command line, put together of `server.commands`. Errors are one sentence on stderr and exit code 2. No torch
until a command needs it."""

import sys
from typing import NoReturn

import sqlalchemy as sa
import typer

from sae_core.errors import DatabaseAway, DataFolderNotWritable, DiskFull, HeadscopeError, MachineError
from server import up
from server.commands import (
    doctor,
    exchange,
    harvests,
    keeping,
    people,
    processes,
    registers,
    saes,
    studies,
    training,
    transcoders,
)
from server.commands.environment import report_to_nobody

app = typer.Typer(
    name="headscope",
    help="A self-hosted browser for what attention layers compute. Start with `headscope demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
# In the order of `headscope --help`. What is added without a name is a command of its own.
app.add_typer(processes.app)
app.add_typer(training.app)
app.add_typer(harvests.app)
app.add_typer(saes.app)
app.add_typer(people.app)
app.add_typer(doctor.app)
app.add_typer(keeping.app)
app.add_typer(keeping.db_app, name="db")
app.add_typer(registers.model_app, name="model")
app.add_typer(registers.corpus_app, name="corpus")
app.add_typer(exchange.import_app, name="import")
app.add_typer(exchange.export_app, name="export")
app.add_typer(harvests.harvests_app, name="harvests")
app.add_typer(saes.saes_app, name="saes")
app.add_typer(transcoders.transcoders_app, name="transcoders")
app.add_typer(people.user_app, name="user")
app.add_typer(people.key_app, name="key")
app.add_typer(studies.study_app, name="study")


def main() -> None:
    """Run a command; every error that a person can mend is one sentence."""
    report_to_nobody()
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
