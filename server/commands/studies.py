"""Commands that ask a question of a feature, an SAE or a model's heads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_core.config import AnyStudy, HeadsStudy, InductionStudy, IoiStudy, PrefixStudy, RowsConfig, SpecificityStudy, Wishes
from sae_core.errors import UsageError
from server import doctor as doctors
from server import jobs, terminal
from server.commands.arguments import OF_JOB, Data, Device, LanguageModel, Revision, Watch
from server.commands.environment import give_token
from server.commands.opened import opened, settings_with
from server.commands.printing import aside, say, say_json, table
from server.commands.running import carry_out
from server.commands.sources import check_text, corpus_for, find_corpus, find_model
from server.db import Database
from server.fields import split_texts
from server.jobs import Jobs
from server.options import built, given, options, takes
from server.settings import Settings
from server.store import registry, studies

study_app = typer.Typer(
    help="Questions put to a feature, or to the heads of a model; the answers have pages.", no_args_is_help=True
)

TEXTS, EXPRESSION = "<text>,...", "<expression>"
OfSae = Annotated[str, typer.Option("--sae", help="Name of the SAE.")]
AsJson = Annotated[bool, typer.Option("--json", help="Wait for the end and print one JSON object.")]
TextToSee = Annotated[
    str | None,
    typer.Option("--corpus", help="Real text to see them in; none leaves it out.", show_default="of the model's newest SAE"),
]


@study_app.command(
    "specificity",
    epilog='Examples: [bold]headscope study specificity --sae mine --feature 14 --induction " board"[/bold]; '
    '[bold]headscope study specificity --sae mine --feature 7 --tokens " he, she" --not-regex "[.!?] \\w+"[/bold]',
)
@takes(OF_JOB, options(SpecificityStudy, skip=("kind", "sae", "feature", "corpus", "rows", "proxies")))
def study_specificity(
    sae: OfSae,
    feature: Annotated[int, typer.Option("--feature", help="Index of the feature.")],
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens",
            help="The token is one of these, spaces and all; a comma that belongs to one has a backslash before it.",
            metavar=TEXTS,
        ),
    ] = None,
    regex: Annotated[
        list[str] | None,
        typer.Option(
            "--regex", help="A match ends where the row's text, up to and including the token, ends.", metavar=EXPRESSION
        ),
    ] = None,
    token_regex: Annotated[
        list[str] | None, typer.Option("--token-regex", help="The token's own text matches.", metavar=EXPRESSION)
    ] = None,
    induction: Annotated[
        list[str] | None,
        typer.Option(
            "--induction",
            help="One of these is next by induction: the token stood earlier in the row, followed by it.",
            metavar=TEXTS,
        ),
    ] = None,
    not_tokens: Annotated[
        list[str] | None, typer.Option("--not-tokens", help="The token is none of these.", metavar=TEXTS)
    ] = None,
    not_regex: Annotated[list[str] | None, typer.Option("--not-regex", help="No match ends there.", metavar=EXPRESSION)] = None,
    not_token_regex: Annotated[
        list[str] | None, typer.Option("--not-token-regex", help="The token's own text does not match.", metavar=EXPRESSION)
    ] = None,
    not_induction: Annotated[
        list[str] | None, typer.Option("--not-induction", help="None of these is next by induction.", metavar=TEXTS)
    ] = None,
    corpus: Annotated[str | None, typer.Option("--corpus", help="Text to read.", show_default="the training's")] = None,
    as_json: AsJson = False,
    watch: Watch = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Hold a feature against a proxy that you write: how specific and how sensitive it is, with examples of where they differ.

    Several proxies, or one given several times, must all hold.
    """
    proxies = [
        proxy | {"negated": negated}
        for negated, written in (
            (False, (tokens, regex, token_regex, induction)),
            (True, (not_tokens, not_regex, not_token_regex, not_induction)),
        )
        for proxy in _proxies(*written)
    ]
    if not proxies:
        raise UsageError(
            "Say what the feature is held against: --tokens, --regex, --token-regex or --induction.", field="proxies"
        )
    raw = {"sae": sae, "feature": feature, "proxies": proxies} | given(values, SpecificityStudy)
    built(SpecificityStudy, raw | {"corpus": "checked-later"}, OF_STUDY)
    with opened(settings_with(data=data, device=device)) as (settings, db), aside(as_json):
        give_token(settings)
        with db.read() as session:
            record = registry.sae(session, sae)
        found, rows = corpus_for(db, record, corpus, "read")
        cfg = built(SpecificityStudy, raw | {"corpus": found.name}, OF_STUDY)
        rows = rows or RowsConfig(context=record.config.context, tokens=cfg.tokens_swept, heldout_tokens=0)
        jobs.check_feature(record, feature)
        with db.write() as session:
            registry.add_corpus(session, found.name, found.source)
        wishes = built(Wishes, given(values, Wishes))
        made = _study(settings, db, cfg.model_copy(update={"rows": rows}), wishes, wait=watch or as_json)
    _show_study(made, as_json)


@study_app.command(
    "heads",
    epilog="Examples: [bold]headscope study heads --model gpt2[/bold]; "
    "[bold]headscope study heads --model smollm2 --layers 16,17,18 --corpus none[/bold]",
)
@takes(OF_JOB, options(HeadsStudy, skip=("kind", "model", "corpus", "rows")))
def study_heads(
    model: LanguageModel,
    corpus: TextToSee = None,
    revision: Revision = None,
    as_json: AsJson = False,
    watch: Watch = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Score every head: where it attends (token before, copies, induction, row start), what it writes (copies, successors)."""
    _study_of_heads(HeadsStudy, model, corpus, revision, values, as_json=as_json, watch=watch, data=data, device=device)


@study_app.command(
    "induction",
    epilog="Examples: [bold]headscope study induction --model gpt2 --layers 5[/bold]; "
    "[bold]headscope study induction --model smollm2 --corpus ./texts --samples 400[/bold]",
)
@takes(OF_JOB, options(InductionStudy, skip=("kind", "model", "corpus", "rows")))
def study_induction(
    model: LanguageModel,
    corpus: TextToSee = None,
    revision: Revision = None,
    as_json: AsJson = False,
    watch: Watch = False,
    data: Data = None,
    device: Device = None,
    **values: Any,
) -> None:
    """Find the heads that do induction, and tell those that need a long repeated prefix from those that need one token."""
    _study_of_heads(InductionStudy, model, corpus, revision, values, as_json=as_json, watch=watch, data=data, device=device)


def _study_of_sae(kind: type[IoiStudy | PrefixStudy], about: str, more: str) -> None:
    """Add the command of a study of an SAE that needs no text."""
    name = kind.model_fields["kind"].default
    usual = f"headscope study {name} --sae mine"

    @study_app.command(name, help=about, epilog=f"Examples: [bold]{usual}[/bold]; [bold]{usual} {more}[/bold]")
    @takes(OF_JOB, options(kind, skip=("kind", "sae")))
    def study(
        sae: OfSae, as_json: AsJson = False, watch: Watch = False, data: Data = None, device: Device = None, **values: Any
    ) -> None:
        cfg = built(kind, {"sae": sae} | given(values, kind), {})
        with opened(settings_with(data=data, device=device)) as (settings, db), aside(as_json):
            give_token(settings)
            made = _study(settings, db, cfg, built(Wishes, given(values, Wishes)), wait=watch or as_json)
        _show_study(made, as_json)


_study_of_sae(
    IoiStudy,
    'Ablate features at the second subject of "When Mary and John ... John gave it to", and ask what their layer says there.',
    "--samples 40 --layers 5,6",
)
_study_of_sae(
    PrefixStudy,
    "Find the features that do induction, tell those that need a long repeated prefix, and ablate them.",
    "--samples 100 --length 128",
)


def _study_of_heads(
    kind: type[HeadsStudy | InductionStudy],
    model: str,
    corpus: str | None,
    revision: str | None,
    values: dict[str, Any],
    *,
    as_json: bool,
    watch: bool,
    data: Path | None,
    device: str | None,
) -> None:
    """A study of a model's heads, on the text of its newest SAE unless another is named."""
    raw = given(values, kind)
    built(kind, raw | {"model": "checked-later"}, OF_STUDY)
    with opened(settings_with(data=data, device=device)) as (settings, db), aside(as_json):
        give_token(settings)
        found = find_model(db, model, revision)
        with db.read() as session:
            trained = studies.training_of(session, found.name)
        asked = corpus if corpus is not None else trained.corpus if trained else "none"
        text = None if asked == "none" else find_corpus(db, asked)
        cfg = built(kind, raw | {"model": found.name, "corpus": text.name if text else None}, OF_STUDY)
        if text:
            same = trained is not None and trained.corpus == text.name
            own = RowsConfig(context=cfg.length, tokens=cfg.text_rows * cfg.length, heldout_tokens=0)
            cfg = cfg.model_copy(update={"rows": trained.rows if trained and same else own})
        if text and text.new:
            check_text(text.source)
        with db.write() as session:
            registry.add_model(session, found.name, found.source)
            if text:
                registry.add_corpus(session, text.name, text.source)
        made = _study(settings, db, cfg, built(Wishes, given(values, Wishes)), wait=watch or as_json)
    _show_study(made, as_json)


OF_STUDY = {f"proxies.{name}": "" for name in ("texts", "pattern")}


def _proxies(
    tokens: list[str] | None, regex: list[str] | None, token_regex: list[str] | None, induction: list[str] | None
) -> Iterator[dict[str, Any]]:
    """The proxies that were written, not checked yet."""
    for kind, texts in (("tokens", tokens), ("induction", induction)):
        for text in texts or ():
            if not text:
                raise UsageError(f"--{kind} is empty; name one token or more, such as --{kind} ' board'.", field=kind)
            yield {"kind": kind, "texts": split_texts(text)}
    for on, name, patterns in (("text", "regex", regex), ("token", "token-regex", token_regex)):
        for pattern in patterns or ():
            if not pattern:
                raise UsageError(f"--{name} is empty; write an expression, such as --{name} '[0-9]$'.", field=name)
            yield {"kind": "regex", "pattern": pattern, "on": on}


def _study(settings: Settings, db: Database, cfg: AnyStudy, wishes: Wishes, *, wait: bool) -> studies.StudyRecord | None:
    """Queue a study, or make it here when no worker runs; what it found, unless that is left to a worker."""
    queue = Jobs(settings, db, wishes)
    alive = queue.worker_alive()
    job_id = queue.enqueue_study(cfg)
    if (job := queue.get(job_id)).status == "done":
        say(f"{job_id} is done already: the same question would get the same answer.")
    else:
        if not alive:
            doctors.need_worker_extra()
        if job.status in ("failed", "cancelled"):
            queue.retry(job_id)
        if not carry_out(settings, db, job_id, alive=alive, watch=wait):
            return None
    with db.read() as session:
        made = studies.of_job(session, job_id)
        return studies.study(session, made) if made is not None else None


def _show_study(made: studies.StudyRecord | None, as_json: bool) -> None:
    if made is None:
        return
    if as_json:
        say_json(made.result)
        return
    table(("measure", "value"), terminal.study(made.result), "")
    say(f"Its plots are at /studies/{made.id}.")
