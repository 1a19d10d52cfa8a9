"""Commands for the transcoders of models' MLPs."""

from typing import Annotated

import typer

from sae_core.errors import UsageError
from server.commands.arguments import Data
from server.commands.opened import opened, settings_with
from server.commands.printing import say, table
from server.store import transcoders

transcoders_app = typer.Typer(help="Transcoders of models' MLPs, which circuits go through.", no_args_is_help=True)


@transcoders_app.command("list")
def transcoders_list(data: Data = None) -> None:
    """Transcoders of models' MLPs, with what each was found to leave on a short text."""
    with opened(settings_with(data=data)) as (_, db), db.read() as session:
        rows = [
            (one.model, str(one.layer), f"{one.n_features:,}", f"{one.config['reads']} to {one.config['writes']}",
             f"{one.config['fvu']:.3f}", f"{one.config['l0']:.0f}", one.sha256[:12])
            for one in transcoders.every(session)
        ]  # fmt: skip
    heads = ("model", "layer", "features", "from", "FVU", "L0", "sha256")
    table(heads, rows, "No model has a transcoder; `headscope import transcoder` gives it one.")


@transcoders_app.command("delete", epilog="Example: [bold]headscope transcoders delete smollm2 10 --yes[/bold]")
def transcoders_delete(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    layer: Annotated[int, typer.Argument(help="Layer of the MLP.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it.")] = False,
    data: Data = None,
) -> None:
    """Take a transcoder from its model, and delete its file."""
    with opened(settings_with(data=data)) as (settings, db):
        if not yes:
            raise UsageError(
                f"The transcoder of layer {layer} of {model} would be deleted with its file; add --yes.", field="yes"
            )
        with db.write() as session:
            file = transcoders.delete(session, model, layer)
        (settings.data / file).unlink(missing_ok=True)
    say(f"Layer {layer} of {model} has no transcoder any more.")
