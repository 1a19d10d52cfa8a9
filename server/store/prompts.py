"""Typed text: the SAEs it can be put to, what is known of the features that fire on it, and texts that people share."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from sae_core.errors import NotFound, UsageError
from server.store.features import FeatureRow, feature_rows
from server.store.kept import kept
from server.store.saes import Door, find_sae
from server.store.viewers import Visibility, check_own, check_visibility, everything, noted, own
from server.tables import SAE, Account, Feature, Model, Prompt, now

LONGEST = 40_000
"""Characters of a text; how many tokens are taken is the engine's to say."""
LONGEST_DAYS = 3650


@dataclass(frozen=True)
class SaeChoice:
    """An SAE that text can be put to."""

    name: str
    layer: int
    d_sae: int
    harvested: bool
    """Whether it has a published harvest, so that its features have maxima and labels."""


@dataclass(frozen=True)
class ModelChoice:
    """A model with SAEs, by layer."""

    name: str
    saes: tuple[SaeChoice, ...]
    """Those that are not archived."""


@dataclass(frozen=True)
class SharedLine:
    """A shared prompt among others."""

    id: str
    """Random; whoever may see the prompt opens it by this."""
    beginning: str
    """Its first characters."""
    visibility: Visibility
    """Who sees it, where there are accounts."""
    owner: str | None
    """Whose it is; null where it was made without accounts."""
    created_at: datetime
    expires_at: datetime | None
    """When it is deleted; null for never."""


@dataclass(frozen=True)
class SharedPrompt:
    """A text that somebody shared, with the view of it."""

    line: SharedLine
    """What is told of it first."""
    text: str
    """The text."""
    against: str | None
    """A second text that it is compared with."""
    model: str | None
    """All SAEs of this model were asked; null where some were named."""
    saes: tuple[str, ...]
    """Names of those that were; none that the viewer does not see."""
    view: dict[str, Any]
    """What was looked at: `at` and `against_at` are positions, `feature` has `sae`, `index` and `dest`."""


def choices(session: Session) -> tuple[ModelChoice, ...]:
    """Every model with SAEs: one query."""
    rows = session.execute(
        sa.select(Model.name, SAE.name, SAE.layer, SAE.d_sae, SAE.harvest_id)
        .join(SAE, SAE.model_id == Model.id)
        .where(SAE.archived_at.is_(None))
        .order_by(Model.name, SAE.layer, SAE.name)
    )
    found: dict[str, list[SaeChoice]] = {}
    for model, name, layer, d_sae, harvest in rows:
        found.setdefault(model, []).append(SaeChoice(name, layer, d_sae, harvest is not None))
    return tuple(ModelChoice(model, tuple(saes)) for model, saes in found.items())


def asked_doors(session: Session, names: Sequence[str]) -> list[Door]:
    """The SAEs of these names, in their order; NotFound for one that is not there."""
    return [find_sae(session, name) for name in names]


def strongest_ever(session: Session, door: Door) -> NDArray[np.float32] | None:
    """Each feature's largest activation in the published harvest, [d_sae], 0 where it never fired; None without a harvest."""
    harvest = door.sae.harvest
    if harvest is None:
        return None

    def read() -> NDArray[np.float32]:
        found = np.zeros(door.sae.d_sae, dtype=np.float32)
        rows = session.execute(sa.select(Feature.idx, Feature.max_act).where(Feature.harvest_id == harvest.id)).all()
        found[[idx for idx, _ in rows]] = [most or 0.0 for _, most in rows]
        return found

    return kept(session, harvest, "strongest ever", read)


def told(session: Session, door: Door, wanted: Iterable[int]) -> Mapping[int, FeatureRow]:
    """What the harvest and people say of these features, by index: one query."""
    return {row.index: row for row in feature_rows(session, door, None, sorted(set(wanted)))}


# ---- shared ----

_OWNER = sa.select(Account.name).where(Account.id == Prompt.owner_id).scalar_subquery()


def share(
    session: Session,
    text: str,
    against: str | None,
    *,
    model: str | None,
    doors: Sequence[Door],
    view: Mapping[str, Any],
    visibility: str,
    days: int | None,
) -> str:
    """Store a text under a random id, which is returned; for `days`, or for good. What has run out is deleted meanwhile."""
    for part in (text, against or ""):
        if len(part) > LONGEST:
            raise UsageError(f"The text has {len(part)} characters; at most {LONGEST} are kept.", field="text")
    if not text.strip():
        raise UsageError("There is no text to share; type some.", field="text")
    if days is not None and not 1 <= days <= LONGEST_DAYS:
        raise UsageError(f"A shared text is kept for 1 to {LONGEST_DAYS} days, or for good.", field="days")
    session.execute(everything(sa.delete(Prompt).where(Prompt.expires_at <= now())))
    # By number and weights: a name would be told to whoever may not see the SAE, and a number may be given to another one.
    ids = {door.sae.name: [door.id, door.sae.sha256] for door in doors}
    feature = view.get("feature")
    row = Prompt(
        id=secrets.token_urlsafe(18),
        text=_clean(text),
        against=_clean(against) if against else None,
        view={
            **view,
            "saes": list(ids.values()) if model is None else None,
            "model": None if model is None else session.scalar(sa.select(Model.id).where(Model.name == model)),
            "feature": {**feature, "sae": ids[feature["sae"]]} if feature else None,
        },
        visibility=check_visibility(visibility),
        expires_at=None if days is None else now() + timedelta(days=days),
    )
    own(session, row)
    session.add(row)
    session.flush()
    noted(session, visibility=row.visibility)
    return row.id


def _clean(text: str) -> str:
    # PostgreSQL keeps no character 0; no tokenizer needs it.
    return text.replace("\r\n", "\n").replace("\0", "")


def shared(session: Session, prompt_id: str) -> SharedPrompt:
    """The shared prompt of that id; NotFound where there is none, it has run out, or the viewer may not see it."""
    row, owner = _row(session, prompt_id)
    view = dict(row.view)
    ids, feature = view.pop("saes"), view.pop("feature")
    model_id = view.pop("model")
    wanted = [tuple(one) for one in [*(ids or ()), *([feature["sae"]] if feature else ())]]
    rows = session.execute(sa.select(SAE.id, SAE.sha256, SAE.name).where(SAE.id.in_([one for one, _ in wanted])))
    names = {(one, sha256): name for one, sha256, name in rows}
    seen = feature is not None and tuple(feature["sae"]) in names
    return SharedPrompt(
        line=_line(row, owner),
        text=row.text,
        against=row.against,
        model=None if model_id is None else session.scalar(sa.select(Model.name).where(Model.id == model_id)),
        saes=tuple(names[tuple(one)] for one in ids or () if tuple(one) in names),
        view={**view, "feature": {**feature, "sae": names[tuple(feature["sae"])]} if seen else None},
    )


def shared_lines(session: Session, account: int | None) -> tuple[SharedLine, ...]:
    """What an account shared; without accounts, all there is. The newest first."""
    listed = sa.select(Prompt, _OWNER).where(_lasting(), Prompt.owner_id.is_not_distinct_from(account))
    return tuple(_line(*found) for found in session.execute(listed.order_by(Prompt.created_at.desc(), Prompt.id).limit(100)))


def unshare(session: Session, prompt_id: str) -> None:
    """Delete a shared prompt; Forbidden but for its owner and admins."""
    row, _ = _row(session, prompt_id)
    check_own(session, row, "delete this shared text")
    session.delete(row)


def _row(session: Session, prompt_id: str) -> tuple[Prompt, str | None]:
    found = session.execute(sa.select(Prompt, _OWNER).where(Prompt.id == prompt_id[:32], _lasting())).one_or_none()
    if found is None:
        raise NotFound("There is no shared text of that address: it was deleted, has run out, or is not shared with you.")
    return found[0], found[1]


def _lasting() -> sa.ColumnElement[bool]:
    return sa.or_(Prompt.expires_at.is_(None), Prompt.expires_at > now())


def _line(row: Prompt, owner: str | None) -> SharedLine:
    beginning = " ".join(row.text.split())
    beginning = beginning if len(beginning) <= 80 else beginning[:79] + "…"
    return SharedLine(row.id, beginning, check_visibility(row.visibility), owner, row.created_at, row.expires_at)
