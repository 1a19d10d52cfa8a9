"""`/jobs/new/{kind}`: start a training, a harvest or a measurement from a form made from its config; `from` a job, run it again
with changes."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse

from sae_core.config import Config, EvaluateJob, HarvestJob, TrainConfig
from sae_core.errors import HeadscopeError, NotFound, UsageError
from server.forms import filled, groups, refused, typed
from server.jobs import Jobs
from server.pages.reply import Read, reply
from server.pages.writing import Form
from server.store import jobs as store
from server.store import registry
from server.store.saes import find_sae

router = APIRouter()


class Starts(NamedTuple):
    """A kind of job that a form can start."""

    title: str
    words: str
    model: type[Config]
    first: tuple[str, ...]
    """Fields that most people set, in the order of the form."""
    enqueue: Callable[[Jobs, Config, str | None], str]


KINDS: Mapping[str, Starts] = {
    "train": Starts(
        "Train an SAE",
        "From text to a published SAE, then to its harvests.",
        TrainConfig,
        ("model", "corpus", "site.layer", "arch", "expansion", "k", "rows.tokens", "lr", "batch", "passes"),
        lambda jobs, cfg, name: jobs.enqueue_train(cast(TrainConfig, cfg), name=name),
    ),
    "harvest": Starts(
        "Harvest SAEs",
        "One sweep of text through a model and its SAEs; each one's pages show the harvest once it is published.",
        HarvestJob,
        ("saes", "corpus", "harvest.tokens", "harvest.top_k", "harvest.bands", "harvest.per_band"),
        lambda jobs, cfg, _: jobs.enqueue_harvest(cast(HarvestJob, cfg)),
    ),
    "evaluate": Starts(
        "Evaluate an SAE",
        "Measures how good it is on held-out text; the numbers take the place of the old ones.",
        EvaluateJob,
        ("sae", "corpus", "against", "probes"),
        lambda jobs, cfg, _: jobs.enqueue_evaluate(cast(EvaluateJob, cfg)),
    ),
}


@dataclass(frozen=True)
class StartPage:
    """A form as it was asked for or sent."""

    kind: str
    source: str | None
    """The job whose config it began with."""


@router.get("/jobs/new/{kind}", include_in_schema=False)
def blank(request: Request, kind: str, read: Read) -> Response:
    """The form with the defaults, with what the address gives (`sae=`, `model=`), or with a job's config."""
    starts = _starts(kind)
    source = request.query_params.get("from")
    values = {}
    if source:
        job = store.get(read, source)
        if job.kind != kind:
            raise UsageError(f"{source} is a {job.kind} job, and this form starts a {kind} job.", field="from")
        values = typed(job.config)
    given = {key: value for key, value in request.query_params.items() if key != "from"}
    if kind == "harvest" and "sae" in given:
        given["saes"] = given.pop("sae")
    if "sae" in given or "saes" in given:
        values = _of_sae(read, kind, given.get("sae") or given["saes"].split(",")[0]) | values
    return _shown(request, read, StartPage(kind, source), starts, values | given, {}, "")


@router.post("/jobs/new/{kind}", include_in_schema=False)
def send(request: Request, kind: str, read: Read, sent: Form) -> Response:
    """Queue the job, or the form again with what is wrong beside its inputs."""
    starts = _starts(kind)
    name, source = sent.pop("name", "").strip(), sent.pop("from", "") or None
    result = filled(starts.model, sent)
    errors = result.errors
    if result.config is not None:
        try:
            with closing(Jobs(request.app.state.settings, request.app.state.db)) as jobs:
                return RedirectResponse(f"/jobs/{starts.enqueue(jobs, result.config, name or None)}", 303)
        except HeadscopeError as error:
            errors = refused(starts.model, sent, error)
    return _shown(request, read, StartPage(kind, source), starts, sent, errors, name)


def _starts(kind: str) -> Starts:
    if kind not in KINDS:
        raise NotFound(f"No form starts a job of the kind '{kind}'; there are {', '.join(KINDS)}.", field="kind")
    return KINDS[kind]


def _shown(
    request: Request,
    session: Session,
    page: StartPage,
    starts: Starts,
    values: Mapping[str, str],
    errors: Mapping[str, str],
    name: str,
) -> Response:
    models = [record.name for record in registry.models(session)]
    corpora = [record.name for record in registry.corpora(session)]
    saes = sorted(registry.sae_names(session))
    known = {"model": models, "corpus": corpora, "sae": saes, "saes": saes, "against": saes}
    lacking = [
        what
        for what, there in (("model", models), ("corpus", corpora), ("SAE", saes))
        if not there and (what != "SAE" if page.kind == "train" else what != "model")
    ]
    return reply(
        request,
        page,
        "start.html",
        status=422 if errors else 200,
        starts=starts,
        groups=groups(starts.model, values, errors, first=starts.first, known=known),
        errors=errors,
        lacking=lacking,
        name=name,
        alive=bool(store.workers(session, seen_within=60)),
    )


def _of_sae(session: Session, kind: str, name: str) -> dict[str, str]:
    """What a job about an SAE best begins with: the corpus and the rows that it was trained on, so that what was held out is."""
    stored = find_sae(session, name).config.get("train")
    if not stored:
        return {}
    train = TrainConfig.model_validate(stored)
    begun: dict[str, Any] = {"corpus": train.corpus, "rows": train.rows.model_dump()}
    if kind == "harvest" and train.harvests:
        begun["harvest"] = train.harvests[-1].model_dump()
    return typed(begun)
