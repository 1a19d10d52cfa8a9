"""Who reads, and what they see: the one place where visibility is applied to queries.

A session of the web carries its viewer (`seen_by`). To every ORM statement of such a session, its subqueries and joins
included, `SeenSession` adds what that viewer may see of each table that names an SAE, a list, a job or a prompt; a statement
cannot forget it. What is told of a harvest (features, examples, texts, tokens, heads) is read by the harvest's number, which
only an SAE or a harvest that is seen gives away. The worker and the command line have no viewer and see everything: whoever
runs them can read the database itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

import sqlalchemy as sa
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria

from sae_core.errors import Forbidden, UsageError
from server.db import Database
from server.tables import (
    SAE,
    Corpus,
    FeatureList,
    FormerName,
    Harvest,
    Job,
    JobLog,
    JobPoint,
    JobSae,
    Label,
    ListEntry,
    Model,
    Note,
    Prompt,
    Rating,
    Review,
    ReviewFeature,
    Star,
    Study,
    Transcoder,
    Worker,
)

Role = Literal["anonymous", "reader", "editor", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Each may do what the one before it may, and more."""
Visibility = Literal["private", "shared", "public"]
VISIBILITIES: tuple[Visibility, ...] = get_args(Visibility)
"""Of an SAE, a list, a job or a shared prompt: seen by its owner and admins; by everybody with an account; by everybody."""


@dataclass(frozen=True)
class Viewer:
    """Who asks."""

    role: Role = "anonymous"
    account: int | None = None
    """Id of the account; None without one."""
    name: str | None = None
    way: str = ""
    """How they came in: `login`, or `key` and its name."""
    address: str = ""
    """Where from."""

    def may(self, role: Role) -> bool:
        """Whether they may do what `role` may."""
        return ROLES.index(self.role) >= ROLES.index(role)


LOCAL = Viewer(role="admin")
"""Whoever is at this machine while there are no accounts, the command line and the worker: they may do everything."""
ANONYMOUS = Viewer()


def viewer_of(session: Session) -> Viewer:
    """Whose session it is."""
    found: Viewer = session.info.get("viewer", LOCAL)
    return found


def seen_by(db: Database, viewer: Viewer, before_commit: Callable[[Session], None] | None = None) -> Database:
    """The database as `viewer` sees it. `before_commit` is called at the end of each transaction that writes."""
    return db.bound(Session if viewer.may("admin") else SeenSession, {"viewer": viewer}, before_commit)


E = TypeVar("E", bound=sa.Executable)


def everything(statement: E) -> E:
    """The statement, reading what its viewer does not see as well: which names are taken must hold for all."""
    found: E = statement.execution_options(**{_EVERYTHING: True})
    return found


_EVERYTHING = "headscope_everything"


class SeenSession(Session):
    """A session whose statements find only what its viewer may see."""


@sa.event.listens_for(SeenSession, "do_orm_execute")
def _only_what_is_seen(state: ORMExecuteState) -> None:
    if state.is_orm_statement and not state.is_insert and not state.execution_options.get(_EVERYTHING):
        state.statement = state.statement.options(*_criteria(viewer_of(state.session).account))


# ---- what is hidden ----
# In terms of tables, not of classes, so that nothing is added to these conditions themselves. Few things are hidden, so what
# is left out is listed, once a statement, in place of what is found.


def _hidden(of: sa.FromClause, account: int | None) -> sa.ColumnElement[bool]:
    """The condition that an SAE, a list or a job by itself is not seen by the account, or without one."""
    if account is None:
        return of.c.visibility != "public"
    return sa.and_(of.c.visibility == "private", of.c.owner_id.is_distinct_from(account))


@lru_cache(maxsize=256)
def _criteria(account: int | None) -> tuple[Any, ...]:
    sae, listed, job = SAE.__table__, FeatureList.__table__, Job.__table__
    harvest, reads, review = Harvest.__table__, JobSae.__table__, Review.__table__
    hidden_sae = _hidden(sae, account)
    saes = sa.select(sae.c.id).where(hidden_sae)
    lists = sa.select(listed.c.id).where(_hidden(listed, account))
    jobs = sa.union_all(
        sa.select(job.c.id).where(_hidden(job, account)),
        sa.select(sae.c.job_id).where(hidden_sae, sae.c.job_id.is_not(None)),
        sa.select(reads.c.job_id).join(sae, sae.c.id == reads.c.sae_id).where(hidden_sae),
        sa.select(harvest.c.job_id).join(sae, sae.c.id == harvest.c.sae_id).where(hidden_sae),
    )
    reviews = sa.select(review.c.id).where(review.c.sae_id.in_(saes))
    seen: dict[Any, sa.ColumnElement[bool]] = {
        SAE: sa.not_(_of(SAE, account)),
        FeatureList: sa.not_(_of(FeatureList, account)),
        Prompt: sa.not_(_of(Prompt, account)),
        Job: Job.id.not_in(jobs),
        Study: sa.and_(Study.job_id.not_in(jobs), sa.or_(Study.sae_id.is_(None), Study.sae_id.not_in(saes))),
        ListEntry: sa.and_(ListEntry.sae_id.not_in(saes), ListEntry.list_id.not_in(lists)),
        **{table: table.sae_id.not_in(saes) for table in (FormerName, Harvest, Label, Note, Star, Review, JobSae)},
        **{table: table.job_id.not_in(jobs) for table in (JobLog, JobPoint)},
        **{table: table.review_id.not_in(reviews) for table in (ReviewFeature, Rating)},
    }
    if account is None:
        shown = sa.select(sae.c.model_id).where(sa.not_(hidden_sae))
        swept = sa.select(harvest.c.corpus_id).join(sae, sae.c.id == harvest.c.sae_id).where(sa.not_(hidden_sae))
        seen |= {
            Model: Model.id.in_(shown),
            Transcoder: Transcoder.model_id.in_(shown),
            Corpus: Corpus.id.in_(swept),
            Worker: sa.false(),
        }
    return tuple(with_loader_criteria(table, condition, include_aliases=True) for table, condition in seen.items())


def _of(table: Any, account: int | None) -> sa.ColumnElement[bool]:
    """`_hidden`, of the rows of a statement."""
    if account is None:
        return table.visibility != "public"  # type: ignore[no-any-return]
    return sa.and_(table.visibility == "private", table.owner_id.is_distinct_from(account))


def sees_all(session: Session) -> bool:
    """Whether nothing is hidden from whoever's session it is."""
    return viewer_of(session).may("admin")


def seen_metrics(session: Session, metrics: dict[str, Any]) -> dict[str, Any]:
    """What is known of an SAE, without how it compares with SAEs that the viewer does not see."""
    compared = metrics.get("stability")
    if not compared or sees_all(session):
        return metrics
    seen = set(session.scalars(sa.select(SAE.name).where(SAE.name.in_([one["against"] for one in compared]))))
    return {**metrics, "stability": [one for one in compared if one["against"] in seen]}


# ---- whose things are ----


def own(session: Session, row: SAE | FeatureList | Job | Prompt) -> None:
    """Give a new row to whoever's session it is."""
    row.owner_id = viewer_of(session).account


def check_own(session: Session, row: SAE | FeatureList | Job | Prompt, what: str) -> None:
    """Raise Forbidden unless whoever's session it is may do what only owners and admins do."""
    viewer = viewer_of(session)
    if not viewer.may("admin") and (row.owner_id is None or row.owner_id != viewer.account):
        raise Forbidden(f"Only its owner or an admin may {what}.")


def noted(session: Session, **facts: str) -> None:
    """Facts about a change for the audit log, where one is kept."""
    session.info.setdefault("noted", {}).update(facts)


def check_visibility(asked: str) -> Visibility:
    """`asked` as one of VISIBILITIES; UsageError when it is none."""
    for known in VISIBILITIES:
        if asked == known:
            return known
    raise UsageError(f"'{asked[:20]}' is no visibility; there are {', '.join(VISIBILITIES)}.", field="visibility")
