"""The command that looks at this machine."""

from typing import Annotated, Any

import typer

from sae_core.config import RowsConfig, Site, TrainConfig
from server import doctor as doctors
from server.commands.arguments import Data
from server.commands.opened import settings_with
from server.commands.printing import say_json, table
from server.options import built, given, options, takes

app = typer.Typer()


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
    found = doctors.report(settings_with(data=data), cfg, features=features, measure=measure)
    if as_json:
        say_json(found)
        return
    table(None, doctors.lines(found), "")
