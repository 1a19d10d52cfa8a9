"""Commands for models and corpora, registered by name."""

from pathlib import Path
from typing import Annotated

import typer

from sae_core.config import CorpusSource
from sae_core.errors import UsageError
from server.commands.arguments import Data
from server.commands.environment import give_token
from server.commands.opened import opened, settings_with
from server.commands.printing import say, table
from server.commands.sources import check_text, corpus_location, load_model, model_source
from server.keeping import room
from server.store import registry

model_app = typer.Typer(help="Language models, registered by name.", no_args_is_help=True)
corpus_app = typer.Typer(help="Bodies of text, registered by name.", no_args_is_help=True)


@model_app.command(
    "add", epilog="Examples: [bold]headscope model add gpt2[/bold]; [bold]headscope model add mine ./llama.gguf[/bold]"
)
def model_add(
    name: Annotated[str, typer.Argument(help="Name to register it by.")],
    location: Annotated[str | None, typer.Argument(help="Hub name, folder or .gguf file.", show_default="the name")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    check: Annotated[bool, typer.Option(help="Load it, to see that its attention can be attributed.")] = True,
    data: Data = None,
) -> None:
    """Register a language model."""
    with opened(settings_with(data=data)) as (settings, db):
        give_token(settings)
        source = model_source(location or name, revision)
        info = load_model(settings, name, source).info if check else None
        with db.write() as session:
            registry.add_model(session, name, source)
            if info:
                registry.note_shape(session, name, info)
        said = f": {info.n_layers} layers, {info.n_heads} heads of {info.d_head}" if info else ", not loaded yet"
        say(f"{name} is registered{said}.")


@model_app.command("list")
def model_list(data: Data = None) -> None:
    """Models that are registered."""
    with opened(settings_with(data=data)) as (_, db), db.read() as session:
        rows = [(m.name, m.source.location, str(m.n_layers or "?"), str(m.n_heads or "?")) for m in registry.models(session)]
    table(("name", "location", "layers", "heads"), rows, "No model is registered; `headscope model add` registers one.")


@corpus_app.command("add", epilog="Example: [bold]headscope corpus add pile hf:NeelNanda/pile-10k[/bold]")
def corpus_add(
    name: Annotated[str, typer.Argument(help="Name to register it by.")],
    location: Annotated[str, typer.Argument(help="A text, jsonl or parquet file, a folder of them, or hf:<data set>.")],
    field: Annotated[str, typer.Option("--field", help="Field or column that holds the text.")] = "text",
    split: Annotated[str, typer.Option("--split", help="Split of a hub data set.")] = "train",
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub data set.")] = None,
    data: Data = None,
) -> None:
    """Register a body of text. It stays where it is."""
    with opened(settings_with(data=data)) as (settings, db):
        give_token(settings)
        source = CorpusSource(location=corpus_location(location), field=field, split=split, revision=revision)
        check_text(source)
        with db.write() as session:
            registry.add_corpus(session, name, source)
        say(f"{name} is registered.")


@corpus_app.command("list")
def corpus_list(data: Data = None) -> None:
    """Corpora that are registered."""
    with opened(settings_with(data=data)) as (_, db), db.read() as session:
        rows = [(c.name, c.source.location, c.source.field) for c in registry.corpora(session)]
    table(("name", "location", "field"), rows, "No corpus is registered; `headscope corpus add` registers one.")


@corpus_app.command(
    "remove-document",
    epilog="Examples: [bold]headscope corpus remove-document pile --file letter.txt[/bold]; "
    "[bold]headscope corpus remove-document pile --id 1204 --yes[/bold]",
)
def corpus_remove_document(
    name: Annotated[str, typer.Argument(help="The corpus, as `headscope corpus list` says it.")],
    text: Annotated[str | None, typer.Option("--text", help="Its text, or a part that tells it from others.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A file with that.")] = None,
    digest: Annotated[str | None, typer.Option("--hash", help="SHA-256 of its text, or at least its first 8 digits.")] = None,
    index: Annotated[int | None, typer.Option("--id", min=0, help="Its place in the corpus, from 0.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this only what would go is said.")] = False,
    data: Data = None,
) -> None:
    """Remove a document's text from harvests, search, rows and activations, and leave it out of all that is made later."""
    from server.keeping import removal

    if sum(given_ is not None for given_ in (text, file, digest, index)) != 1:
        raise UsageError("Name the document by one of --text, --file, --hash and --id.", field="text")
    with opened(settings_with(data=data)) as (settings, db):
        with db.read() as session:
            source = registry.corpus(session, name).source
        asked = file.read_text() if file is not None else text
        found = removal.find(settings, db, name, removal.search(source, text=asked, digest=digest, index=index))
        for digest_, said in zip(found.hashes, found.texts, strict=True):
            say(f"{digest_[:16]}  {len(said):,} characters: {' '.join(said.split())[:60]}")
        held = removal.remove(settings, db, found) if yes else found.held
    what = (
        f"{held.contexts:,} rows of text with {held.examples:,} examples, {held.studies} studies, {held.written} labels, notes "
        f"and the like, {len(found.folders)} folders ({room.gigabytes(found.bytes)}) of rows, activations and jobs' files"
    )
    if not yes:
        raise UsageError(f"This would take it out of {what}; add --yes.", field="yes")
    say(f"It is taken out of {what}. Backups, exports and the corpus's own files are yours to see to.")
