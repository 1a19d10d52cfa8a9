"""A database with one of everything that a page can show, and the addresses of every kind of page.

Beside what there is to see stand the states of having nothing, of waiting, of having failed and of not being let in.
"""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from server.db import Database
from server.settings import Settings
from server.store import jobs as store_jobs
from server.store import labels, lists, prompts, ratings
from server.store.saes import find_sae
from server.tables import SAE, Harvest, Job, JobLog, Prompt, Study
from tests.web import test_compare as compare
from tests.web.accounts import NAMES
from tests.web.conftest import put
from tests.web.factory import Shape, add_sae
from tests.web.test_metrics import MEASURED
from tests.web.test_study import keep, of_every_head, of_heads, of_saes, specific
from tests.web.test_sweep import add_sweep

A, B = compare.A, compare.B
HERE = f"/saes/{A}"
SHARED = "shared-text-of-the-tests"
PAGES = {
    "/": ("/",),
    "/author": ("/author",),
    "/search": ("/search?q=the", "/search?q=zzz", "/search"),
    "/saes/{sae}": (
        HERE, f"{HERE}?head=4&leads=true", f"{HERE}?min_density=0.9", f"{HERE}?min_density=often", "/saes/unharvested",
    ),
    "/saes/{sae}/search": (f"{HERE}/search?q=the&kind=text", f"{HERE}/search?q=a&kind=label", f"{HERE}/search?q=the&kind=token"),
    "/saes/{sae}/manage": (f"{HERE}/manage",),
    "/saes/{sae}/delete": (f"{HERE}/delete",),
    "/harvests/{harvest_id}/delete": ("/harvests/1/delete",),
    "/archive": ("/archive",),
    "/saes/{sae}/heads/{head}": (f"{HERE}/heads/4", f"{HERE}/heads/0"),
    "/models/{model}/heads": ("/models/smollm2-135m/heads",),
    "/saes/{sae}/features/{index}": (f"{HERE}/features/3", f"{HERE}/features/3?all=1&context=full", f"{HERE}/features/7"),
    "/saes/{sae}/features/{index}/related": (f"{HERE}/features/3/related",),
    "/saes/{sae}/features/{index}/examples/{band}/{rank}": (f"{HERE}/features/3/examples/0/0",),
    "/saes/{sae}/features/{index}/components": (f"{HERE}/features/3/components?band=0&rank=0",),
    "/saes/{sae}/features/{index}/circuit": (f"{HERE}/features/3/circuit?band=0&rank=0",),
    "/saes/{sae}/features/{index}/labels": (f"{HERE}/features/3/labels",),
    "/embed/saes/{sae}/features/{index}": (f"/embed{HERE}/features/3?panels=family,heads,tokens,activation,distance,examples",),
    "/labels": ("/labels", "/labels?author=Nobody"),
    "/lists": ("/lists",),
    "/lists/{list_id}": ("/lists/1", "/lists/2"),
    "/saes/{sae}/reviews": (f"{HERE}/reviews",),
    "/reviews/{review_id}": ("/reviews/1", "/reviews/2"),
    "/reviews/{review_id}/rate": ("/reviews/1/rate?place=0", "/reviews/2/rate?place=1"),
    "/compare": (
        "/compare", f"/compare?a={A}&b={A}", f"/compare?a={A}&b={B}", f"/compare?a={A}:3&b={B}:5", f"/compare?sae={A}",
        f"/compare?sae={B}",
    ),
    "/jobs/new/{kind}": (
        "/jobs/new/train", f"/jobs/new/harvest?sae={A}", "/jobs/new/sweep", f"/jobs/new/evaluate?sae={A}", "/jobs/new/heads",
        "/jobs/new/compare", f"/jobs/new/specificity?sae={A}&feature=3&proxies=2", "/jobs/new/induction",
        f"/jobs/new/ioi?sae={A}", f"/jobs/new/prefix?sae={A}",
    ),
    "/jobs": ("/jobs",),
    "/status": ("/status",),
    "/prompt": ("/prompt", f"/prompt?sae={A}"),
    "/interventions": ("/interventions", f"/interventions?sae={A}&feature=3&how=steer&value=8"),
    "/prompts/{prompt_id}": (f"/prompts/{SHARED}",),
    "/prompts/{prompt_id}/circuit": (f"/prompts/{SHARED}/circuit",),
    "/jobs/{job_id}": (
        "/jobs/train-running-1", f"/jobs/train-{A}-1", "/jobs/train-failed-1", "/jobs/train-waiting-1", "/jobs/train-cancelled-1",
    ),
    "/sweeps/{job_id}": ("/sweeps/sweep-s",),
    "/studies": ("/studies", f"/studies?sae={A}&feature=3"),
    "/studies/{study_id}": ("/studies/1", "/studies/2", "/studies/3", "/studies/4", "/studies/5"),
    "/api": ("/api",),
    "": ("/nothing", f"{HERE}/features/100000", "/jobs/nothing"),
}  # fmt: skip
"""Addresses by their route; those of no route are of what is not there."""
OF_PEOPLE = {
    "/login": ("/login",), "/keys": ("/keys",), "/people": ("/people",), "/audit": ("/audit",),
    "": (f"/saes/{NAMES['private']}/manage", "/lists/1", f"/saes/{NAMES['private']}"),
}  # fmt: skip
"""Pages of a lab with accounts."""
NO_PAGES = {
    "/healthz", "/readyz", "/metrics", "/login/oidc", "/login/oidc/back", "/start",
    "/saes/{sae}/random", "/saes/{sae}/jump", "/saes/{sae}/features/{index}/previous",
    "/saes/{sae}/features/{index}/next", "/jobs/{job_id}/events", "/openapi.json",
}  # fmt: skip
"""Routes that lead elsewhere or answer machines; so do those whose names end like a file's."""


def furnish(settings: Settings) -> Settings:
    """Fill the settings' database."""
    put(settings, Shape(n_features=24, n_dead=3, metrics=MEASURED))
    for number, (cfg, result) in enumerate((specific(), of_heads(), of_every_head(), *of_saes()), 1):
        assert keep(settings, cfg, result, f"Question {number}") == number
    database = Database(settings.url)
    with database.write() as session:
        add_sae(session, Shape(sae=B, seed=1, n_features=24, n_dead=2, running_job=False))
        add_sae(session, Shape(sae="archived-l3", seed=2, layer=3, n_features=12, n_dead=1, running_job=False))
        add_sweep(session, made=8, status="done", job="sweep-s")
        _harvest_twice(session)
        _jobs(session)
        _people(session)
        _shared(session)
    database.close()
    return settings


def _shared(session: Session) -> None:
    """A typed text that somebody shared, at an address that is known beforehand."""
    view = {"at": None, "against_at": None, "feature": None}
    door = find_sae(session, A)
    made = prompts.share(session, "The tide", None, model=None, doors=[door], view=view, visibility="shared", days=None)
    session.execute(sa.update(Prompt).where(Prompt.id == made).values(id=SHARED))


def _harvest_twice(session: Session) -> None:
    """A second harvest of B, of which the first is a part; and features of A and B matched."""
    ours, theirs = (session.scalars(sa.select(SAE).where(SAE.name == name)).one() for name in (A, B))
    archived = session.scalars(sa.select(SAE).where(SAE.name == "archived-l3")).one()
    archived.archived_at = datetime(2026, 11, 24, tzinfo=UTC)
    first = session.get_one(Harvest, theirs.harvest_id)
    copied = {column.key: getattr(first, column.key) for column in sa.inspect(Harvest).columns if column.key != "id"}
    session.add(Harvest(**copied | {"job_id": "harvest-again", "status": "replaced"}))
    session.add(
        SAE(
            name="unharvested", model_id=ours.model_id, layer=ours.layer, hook=ours.hook, arch=ours.arch, d_in=ours.d_in,
            d_sae=64, k=8, n_heads=ours.n_heads, config={}, metrics={}, folder="saes/unharvested", sha256="1" * 64,
            job_id=ours.job_id, run=1,
        )
    )  # fmt: skip
    store_jobs.create(session, "compare-a-b", "compare", f"Match features of {A} and {B}", {"sae": A, "against": B})
    result = compare.RESULT | {"harvests": [ours.harvest_id, theirs.harvest_id]}
    session.add(
        Study(
            job_id="compare-a-b", kind="compare", title="Matched", model_id=ours.model_id, sae_id=ours.id, feature=None,
            config={"sae": A, "against": B}, result=result,
        )
    )  # fmt: skip


def _jobs(session: Session) -> None:
    """One job in each state that is not done."""
    at = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
    error = "The corpus demo has no text in it: every document is shorter than 4 tokens. Name another corpus."
    for status in ("failed", "cancelled", "queued"):
        ended = at + timedelta(minutes=3) if status != "queued" else None
        job = Job(
            id=f"train-{'waiting' if status == 'queued' else status}-1", kind="train", title=f"Train layer 3, {status}",
            config={"model": "smollm2-135m", "k": 32}, status=status, attempt=2, created_at=at, finished_at=ended,
            error=error if status == "failed" else None,
        )  # fmt: skip
        session.add(job)
        session.flush()
        session.add(JobLog(job_id=job.id, text="Reading rows."))


def _people(session: Session) -> None:
    """Labels with a history, a note, a star, lists, and reviews: one that two people answered, one that is new."""
    door = find_sae(session, A)
    first = labels.add_label(session, door.id, 3, "dates", "Ines")
    labels.change_label(session, door.id, 3, first, "dates after 'on'", "Maren")
    labels.add_note(session, door.id, 3, "head 4 looks at what followed", "Maren")
    labels.star(session, door.id, 3, "Maren", True)
    mine = lists.create(session, "For the talk", "Clean cases of induction.", "Maren")
    for index in (3, 4, 7):
        lists.add(session, mine, door.id, index, "the cleanest" if index == 3 else "", "Maren")
    lists.create(session, "Nothing in it yet", "", "Maren")
    for seed in (5, 6):
        ratings.create(session, door, 6, seed, "Maren")
    for author, answers in (("Maren", "yyynmy"), ("Ines", "yynnmy")):
        for index, letter in zip(ratings.order_for(session, 1, author), answers, strict=True):
            ratings.rate(session, 1, index, author, {"y": "yes", "n": "no", "m": "maybe"}[letter], "", "")
