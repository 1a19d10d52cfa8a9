"""`/jobs/new/{kind}`: start a job from a form made from its config; `from` a job, run it again with changes."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse

from sae_core.config import (
    AnyStudy,
    CompareJob,
    Config,
    EvaluateJob,
    HarvestJob,
    HeadsStudy,
    InductionStudy,
    IoiStudy,
    PrefixStudy,
    SpecificityStudy,
    SweepConfig,
    TrainConfig,
    Wishes,
)
from sae_core.errors import HeadscopeError, NotFound, UsageError
from server.forms import Group, filled, groups, refused, typed
from server.jobs import Jobs
from server.pages.reply import Read, known_schema, reply
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
    named: str = ""
    """What a name given to the job is for; empty where it takes none."""
    begins: Mapping[str, str] = {}
    """What the form begins with instead of the defaults."""


def _study(jobs: Jobs, cfg: Config, _name: str | None) -> str:
    return jobs.enqueue_study(cast(AnyStudy, cfg))


OF_HEADS = ("model", "layers", "corpus", "samples")
KINDS: Mapping[str, Starts] = {
    "train": Starts(
        "Train an SAE",
        "From text to a published SAE, then to its harvests.",
        TrainConfig,
        ("model", "corpus", "site.layer", "arch", "expansion", "k", "rows.tokens", "lr", "batch", "passes"),
        lambda jobs, cfg, name: jobs.enqueue_train(cast(TrainConfig, cfg), name=name),
        named="What the SAE is called; left empty, a name that tells model, layer and config.",
    ),
    "sweep": Starts(
        "Sweep over settings",
        "Many SAEs on one stream of activations, every combination of what is listed, side by side in a table.",
        SweepConfig,
        ("base.model", "base.corpus", "base.site.layer", "layers", "archs", "ks", "expansions", "seeds", "base.rows.tokens"),
        lambda jobs, cfg, name: jobs.enqueue_sweep(cast(SweepConfig, cfg), name=name),
        named="What the sweep is called; its SAEs' names begin with it.",
        begins={"base.harvests": "0"},
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
    "compare": Starts(
        "Match two SAEs",
        "Their features matched by the cosine of decoder directions, for the page that compares them.",
        CompareJob,
        ("sae", "against"),
        lambda jobs, cfg, _: jobs.enqueue_compare(cast(CompareJob, cfg)),
    ),
    "specificity": Starts(
        "Hold a feature against a condition",
        "How specific and how sensitive the feature is to a condition of yours, with examples of where they differ.",
        SpecificityStudy,
        ("sae", "feature", "corpus", "tokens_swept", "proxies"),
        _study,
    ),
    "induction": Starts(
        "Find induction heads",
        "Which heads do induction, and how long a repeated prefix they need for it.",
        InductionStudy,
        OF_HEADS,
        _study,
    ),
    "ioi": Starts(
        "Indirect objects",
        "What an SAE's features at the second subject do for the indirect object, with controls.",
        IoiStudy,
        ("sae", "samples", "features", "random", "words", "layers"),
        _study,
    ),
    "prefix": Starts(
        "Induction features and their prefixes",
        "Which features of an SAE do induction, how long a repeated prefix they need, and what the prediction owes to them.",
        PrefixStudy,
        ("sae", "samples", "prefixes", "length", "random"),
        _study,
    ),
    "heads": Starts(
        "Study every head",
        "Where each head attends, and what it writes of what it reads.",
        HeadsStudy,
        OF_HEADS,
        _study,
    ),
}


def form_for(kind: str, config: Mapping[str, Any]) -> str | None:
    """The form that starts jobs of a kind; of a study, that of its question."""
    asked = str(config.get("kind")) if kind == "study" else kind
    return asked if asked in KINDS else None


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
    given = {key: value for key, value in request.query_params.items() if value}
    source, name = given.pop("from", None), given.pop("name", "")
    values: dict[str, str] = {}
    if source:
        job = store.get(read, source)
        if form_for(job.kind, job.config) != kind:
            raise UsageError(f"{source} is a {job.kind} job, and this form starts a {kind} job.", field="from")
        values = typed(starts.model, _whole(starts.model, job.config))
    if kind == "harvest" and "sae" in given:
        given["saes"] = given.pop("sae")
    if "sae" in given or "saes" in given:
        values = _of_sae(read, starts.model, given.get("sae") or given["saes"].split(",")[0]) | values
    return _shown(request, read, StartPage(kind, source), starts, values | given, {}, name)


def _whole(model: type[Config], stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored config as today's config says it; as it is where that is not possible."""
    try:
        return model.model_validate(stored).model_dump(mode="json")
    except ValidationError:
        return stored


@router.post("/jobs/new/{kind}", include_in_schema=False)
def send(request: Request, kind: str, read: Read, sent: Form) -> Response:
    """Queue the job, or the form again with what is wrong beside its inputs."""
    starts = _starts(kind)
    name, source = sent.pop("name", "").strip(), sent.pop("from", "") or None
    how = {key: sent.pop(f"how.{key}", "") for key in Wishes.model_fields}
    result, wishes = filled(starts.model, sent), filled(Wishes, how)
    errors = result.errors | {f"how.{key}" if key else "": text for key, text in wishes.errors.items()}
    sent |= {f"how.{key}": value for key, value in how.items()}
    if result.config is not None and wishes.config is not None:
        try:
            with closing(Jobs(request.app.state.settings, known_schema(request), wishes.config)) as jobs:
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
    saes = registry.seen_names(session)
    known = {"model": models, "corpus": corpora, "sae": saes, "saes": saes, "against": saes}
    made = groups(starts.model, values, errors, first=starts.first, known=known, usual=starts.begins)
    made += [_how(values, errors)]
    needed = {one.name.rpartition(".")[2] for group in made for one in group.inputs if one.required}
    wanted = {"model": "model", "corpus": "corpus", "sae": "SAE", "saes": "SAE"}
    lacking = [what for name, what in wanted.items() if name in needed and not known[name]]
    return reply(
        request,
        page,
        "start.html",
        status=422 if errors else 200,
        starts=starts,
        groups=made,
        errors=errors,
        lacking=lacking,
        name=name,
        alive=bool(store.workers(session, seen_within=60)),
    )


def _how(values: Mapping[str, str], errors: Mapping[str, str]) -> Group:
    """How the job is to be done: the same of every kind."""

    def inner(given: Mapping[str, str]) -> dict[str, str]:
        return {key.removeprefix("how."): text for key, text in given.items() if key.startswith("how.")}

    _, group = groups(Wishes, inner(values), inner(errors), first=(), known={}, usual={})
    return group._replace(
        name="how it is done",
        words="How urgent it is, where, and for how long at most.",
        inputs=tuple(one._replace(name=f"how.{one.name}") for one in group.inputs),
    )


def _of_sae(session: Session, model: type[Config], name: str) -> dict[str, str]:
    """What a job about an SAE best begins with: the corpus and the rows that it was trained on, so that what was held out is."""
    stored = find_sae(session, name).config.get("train")
    if not stored:
        return {}
    train = TrainConfig.model_validate(stored)
    begun: dict[str, Any] = {"corpus": train.corpus, "rows": train.rows.model_dump()}
    if train.harvests:
        begun["harvest"] = train.harvests[-1].model_dump()
    return typed(model, begun)
