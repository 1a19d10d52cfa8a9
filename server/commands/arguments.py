"""Arguments and options that commands of several modules take."""

from pathlib import Path
from typing import Annotated

import typer

from sae_core.config import Wishes
from server.options import options

Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of databases, SAEs and running jobs.", envvar="HEADSCOPE_DATA", show_envvar=True),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps.", show_default="the first GPU, else the CPU")
]
Processes = Annotated[
    int | None,
    typer.Option("--processes", help="Processes that train together, a GPU each; results are the same.", show_default="1"),
]
LanguageModel = Annotated[str, typer.Option("--model", help="A registered name, a hub name, a local folder or a .gguf file.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the hub.")]

OF_JOB = options(Wishes)
"""What every command that queues a job takes."""
Watch = Annotated[bool, typer.Option("--watch", help="With a worker running: stay and show progress.")]

NewName = Annotated[str | None, typer.Option("--name", help="What it is to be called.", show_default="as it is")]
Description = Annotated[str | None, typer.Option("--description", help="What is to be said of it.", show_default="as it is")]
Undo = Annotated[bool, typer.Option("--undo", help="Bring it back.")]


def or_kept(given: str | None, kept: str | None) -> str:
    """What was given, else what there is."""
    return given if given is not None else kept or ""
