"""A lab: a private SAE, a shared and a public one, lists of each kind, and people of every role."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from server import access
from server.app import create_app
from server.db import Database
from server.settings import Settings
from server.store import accounts, labels, lists, prompts, ratings, search, studies
from server.store import jobs as store_jobs
from server.store.saes import find_sae
from server.store.viewers import VISIBILITIES
from server.tables import SAE, FeatureList, FormerName, Harvest, Job, JobLog, Prompt
from tests.web.factory import PROSE, Shape, add_sae

WORD = "zebrafish"
"""Stands in everything that belongs to a private SAE or list, and nowhere else."""
NAMES = {seen: f"{seen}-sae" for seen in VISIBILITIES}
PASSWORD = "correct horse battery"  # pragma: allowlist secret
ROLES = {"Ada": "admin", "Ola": "editor", "Ines": "editor", "Rita": "reader"}
"""Ola owns what is private."""


@dataclass(frozen=True)
class Lab:
    """Ids of what is in the database, by who sees it."""

    settings: Settings
    saes: dict[str, int]
    harvests: dict[str, int]
    lists: dict[str, int]
    entries: dict[str, int]
    labels: dict[str, int]
    notes: dict[str, int]
    reviews: dict[str, int]
    studies: dict[str, int]
    jobs: dict[str, str]
    prompts: dict[str, str]


def with_accounts(settings: Settings) -> Settings:
    """The same, with accounts."""
    return settings.model_copy(update={"accounts": True})


def settle(settings: Settings) -> Lab:
    """Fill the database."""
    db = Database(settings.url)
    db.upgrade()
    with db.write() as session:
        kept = access.add_account(session, "Ada", "admin", PASSWORD)
        password = accounts.password_of(session, kept.name)
        assert password is not None
        for name, role in list(ROLES.items())[1:]:
            accounts.add(session, name, role, password[2])
        for layer, seen in enumerate(VISIBILITIES):
            text = f"The {WORD} swam." if seen == "private" else "The tide came back."
            shape = Shape(
                n_features=12, n_dead=2, sae=NAMES[seen], layer=10 + layer, seed=layer, texts=[f"{text} {one}" for one in PROSE],
                running_job=False,
            )  # fmt: skip
            add_sae(session, shape)
    with db.read() as session:
        harvests = session.scalars(sa.select(SAE.harvest_id)).all()
    for harvest in harvests:
        assert harvest is not None
        search.write(db, harvest, search.unfenced)
    with db.write() as session:
        lab = _told(session, settings)
    db.close()
    return lab


def _told(session: Session, settings: Settings) -> Lab:
    lab = Lab(settings, *({} for _ in range(10)))
    ola = accounts.account_id(session, "Ola")
    for seen in VISIBILITIES:
        word = WORD if seen == "private" else "tide"
        row = session.scalars(sa.select(SAE).where(SAE.name == NAMES[seen])).one()
        row.owner_id, row.visibility, row.description = ola, seen, f"about a {word}"
        assert row.harvest_id is not None
        harvest, job = session.get_one(Harvest, row.harvest_id), session.get_one(Job, row.job_id or "")
        harvest.name, job.owner_id, job.visibility = f"{word} harvest", ola, seen
        session.add(JobLog(job_id=job.id, text=f"a {word} was seen"))
        session.add(FormerName(name=f"former-{word}-{seen}", sae_id=row.id))
        session.flush()
        door = find_sae(session, NAMES[seen])
        lab.saes[seen], lab.harvests[seen], lab.jobs[seen] = row.id, harvest.id, job.id
        lab.labels[seen] = labels.add_label(session, row.id, 3, f"{word} label", "Ola")
        lab.notes[seen] = labels.add_note(session, row.id, 3, f"a {word} note", "Ola")
        labels.star(session, row.id, 3, "Ola", True)
        lab.lists[seen] = lists.create(session, f"{word} list", f"of the {word}", "Ola")
        owned = session.get_one(FeatureList, lab.lists[seen])
        owned.owner_id, owned.visibility = ola, seen
        lab.reviews[seen] = ratings.create(session, door, 3, 1, "Ola")
        view = {"at": None, "against_at": None, "feature": {"sae": NAMES[seen], "index": 3, "dest": 1}}
        lab.prompts[seen] = prompts.share(
            session, f"a {word} in a text", None, model=None, doors=[door], view=view, visibility=seen, days=None
        )
        session.get_one(Prompt, lab.prompts[seen]).owner_id = ola
        title = f"{word} study"
        store_jobs.create(session, f"study-{seen}", "study", title, {"sae": row.name})
        lab.studies[seen] = studies.write(
            session, job_id=f"study-{seen}", kind="specificity", title=title, model_id=row.model_id, sae_id=row.id, feature=3,
            config={"sae": row.name}, result={"summary": f"it is a {word}"},
        )  # fmt: skip
    for seen in VISIBILITIES:
        # The private list holds a feature of the shared SAE, and the others hold one of the private SAE beside their own.
        other = "shared" if seen == "private" else "private"
        for sae in (seen, other):
            hidden = WORD if "private" in (seen, sae) else "tide"
            lists.add(session, lab.lists[seen], lab.saes[sae], 3, f"{hidden} entry", "Ola")
        lab.entries[seen] = lists.list_page(session, lab.lists[seen]).entries[0].id
    shared = session.get_one(SAE, lab.saes["shared"])
    against = {"mean": 0.5, "median": 0.5, "above_07": 0.1, "above_09": 0.1, "mutual": 0.1, "mutual_mean": 0.5}
    shared.metrics = {**shared.metrics, "stability": [{"against": NAMES["private"], **against}]}
    both = {"sae": NAMES["shared"], "against": NAMES["private"]}
    store_jobs.create(session, "compare-both", "compare", f"Match features of a {WORD}", both)
    store_jobs.create(session, "harvest-both", "harvest", f"Harvest a {WORD}", {"saes": [NAMES["public"], NAMES["private"]]})
    studies.write(
        session, job_id="compare-both", kind="compare", title=f"{WORD} comparison", model_id=shared.model_id, sae_id=shared.id,
        feature=None, config=both, result={"summary": f"near a {WORD}"},
    )  # fmt: skip
    return lab


@contextmanager
def visitors(app: FastAPI) -> Iterator[dict[str, TestClient]]:
    """Everybody with an account, logged in, by name, and `anonymous`."""
    found = {}
    with TestClient(app):
        for name in (*ROLES, "anonymous"):
            client = TestClient(app, base_url="http://127.0.0.1:8000", follow_redirects=False, raise_server_exceptions=False)
            if name != "anonymous":
                answer = client.post("/login", data={"name": name, "password": PASSWORD})
                assert answer.status_code == 303, answer.text
            found[name] = client
        yield found


def lab_app(settings: Settings) -> FastAPI:
    """The web process with accounts."""
    return create_app(with_accounts(settings))
