"""Blind reviews: features drawn from an SAE's live ones, rated by one or more people, and what comes of it."""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Literal, get_args

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.agreement import cohen_kappa, krippendorff_alpha
from sae_core.errors import NotFound, UsageError
from sae_core.studies.shares import Share, share
from server.store.features import FeatureExample, FeaturePage, HeadShare, TokenWeight
from server.store.labels import add_label, shown_label
from server.store.people import LONGEST_LABEL, many_lines, one_line
from server.store.saes import Door, SaeRef
from server.tables import Feature, Label, Rating, Review, ReviewFeature, now

Answer = Literal["yes", "maybe", "no"]
ANSWERS: tuple[Answer, ...] = get_args(Answer)
DRAWN = 30
"""As many as Kissane et al. looked at per layer."""
MOST_DRAWN = 500


@dataclass(frozen=True)
class Progress:
    """How far a person is."""

    author: str
    rated: int


@dataclass(frozen=True)
class ReviewLine:
    """A review among others."""

    id: int
    n: int
    """Features drawn."""
    n_live: int
    """Live features that they were drawn from, each equally likely."""
    seed: int
    author: str
    created_at: datetime
    people: tuple[Progress, ...]
    """Who rated, and how many."""


@dataclass(frozen=True)
class ReviewsPage:
    """An SAE's reviews, newest first."""

    sae: SaeRef
    reviews: tuple[ReviewLine, ...]


@dataclass(frozen=True)
class RatingRecord:
    """What one person judged of one feature."""

    author: str
    answer: str
    """yes, maybe or no"""
    label: str
    note: str
    created_at: datetime


@dataclass(frozen=True)
class ReviewedFeature:
    """A feature that was drawn, with every person's rating."""

    index: int
    label: str | None
    ratings: tuple[RatingRecord, ...]
    majority: str | None
    """The answer that more than half gave; None without one."""


@dataclass(frozen=True)
class PersonResult:
    """What one person judged of all."""

    author: str
    counts: dict[str, int]
    yes: Share
    """Of those that the person rated, with Wilson's 95 % interval."""


@dataclass(frozen=True)
class Agreement:
    """How far people agree."""

    measure: str
    value: float | None
    """None where nothing varies or nothing is compared."""
    n: int
    """Features that at least two people rated."""
    equal: Share
    """Those of them on which all who rated agree."""


@dataclass(frozen=True)
class ReviewPage:
    """A review with all that was judged."""

    sae: SaeRef
    review: ReviewLine
    features: tuple[ReviewedFeature, ...]
    """By index."""
    people: tuple[PersonResult, ...]
    yes: Share
    """Features that more than half of their raters judge interpretable, of those that anybody rated."""
    agreement: Agreement | None
    """None with fewer than two people."""


@dataclass(frozen=True)
class BlindFeature:
    """A feature as a reviewer sees it: neither its index, its label nor its family."""

    review: int
    sae: str
    place: int
    """From 1, in this reviewer's order."""
    n: int
    rated: int
    """By this reviewer so far."""
    rating: RatingRecord | None
    """What this reviewer said of it before."""
    n_fired: int
    density: float
    max_act: float
    heads: tuple[HeadShare, ...]
    promoted: tuple[TokenWeight, ...]
    suppressed: tuple[TokenWeight, ...]
    examples: tuple[FeatureExample, ...]


# ---- reading ----


def reviews_page(session: Session, door: Door) -> ReviewsPage:
    """The SAE's reviews: two queries."""
    return ReviewsPage(door.sae, tuple(_lines(session, Review.sae_id == door.id)))


def sae_of(session: Session, review_id: int) -> int:
    """Id of the SAE that is reviewed; NotFound without such a review."""
    found = session.scalar(sa.select(Review.sae_id).where(Review.id == review_id))
    if found is None:
        raise NotFound(f"There is no review {review_id}; an SAE's page leads to those of it.", field="review")
    return found


def _lines(session: Session, which: sa.ColumnElement[bool]) -> list[ReviewLine]:
    drawn = sa.select(sa.func.count()).where(ReviewFeature.review_id == Review.id).scalar_subquery()
    rows = session.execute(sa.select(Review, drawn).where(which).order_by(Review.id.desc())).all()
    begun = sa.select(Rating.review_id, Rating.author, sa.func.count()).where(Rating.review_id.in_([row.id for row, _ in rows]))
    counted = session.execute(begun.group_by(Rating.review_id, Rating.author).order_by(Rating.review_id, Rating.author))
    people = {key: tuple(Progress(who, n) for _, who, n in group) for key, group in groupby(counted, key=lambda row: row[0])}
    return [
        ReviewLine(row.id, n, row.n_live, row.seed, row.author, row.created_at, people.get(row.id, ())) for row, n in rows
    ]  # fmt: skip


def review_page(session: Session, door: Door, review_id: int) -> ReviewPage:
    """The review with its result: four queries."""
    (line,) = _lines(session, Review.id == review_id)
    ratings: dict[int, list[RatingRecord]] = {}
    for row in session.scalars(sa.select(Rating).where(Rating.review_id == review_id).order_by(Rating.author)):
        ratings.setdefault(row.idx, []).append(_record(row))
    drawn = session.execute(
        sa.select(ReviewFeature.idx, shown_label(door.id, ReviewFeature.idx))
        .where(ReviewFeature.review_id == review_id)
        .order_by(ReviewFeature.idx)
    )
    features = tuple(
        ReviewedFeature(idx, label, tuple(ratings.get(idx, ())), majority([one.answer for one in ratings.get(idx, ())]))
        for idx, label in drawn
    )
    rated = [one for one in features if one.ratings]
    people = tuple(_person(progress.author, rated) for progress in line.people)
    yes = share(sum(one.majority == "yes" for one in rated), len(rated))
    return ReviewPage(door.sae, line, features, people, yes, agreement([person.author for person in people], rated))


def _record(row: Rating) -> RatingRecord:
    return RatingRecord(row.author, row.answer, row.label, row.note, row.created_at)


def majority(answers: Sequence[str]) -> str | None:
    """The answer that more than half gave."""
    return next((answer for answer, n in Counter(answers).items() if 2 * n > len(answers)), None)


def _person(author: str, rated: Sequence[ReviewedFeature]) -> PersonResult:
    mine = [one.answer for feature in rated for one in feature.ratings if one.author == author]
    return PersonResult(author, {answer: mine.count(answer) for answer in ANSWERS}, share(mine.count("yes"), len(mine)))


def agreement(people: Sequence[str], rated: Sequence[ReviewedFeature]) -> Agreement | None:
    """Cohen's kappa between two people, Krippendorff's alpha among more; of answers without an order."""
    if len(people) < 2:
        return None
    units = [[one.answer for one in feature.ratings] for feature in rated if len(feature.ratings) >= 2]
    equal = share(sum(len(set(unit)) == 1 for unit in units), len(units))
    if len(people) == 2:
        return Agreement("Cohen's kappa", cohen_kappa([(unit[0], unit[1]) for unit in units]), len(units), equal)
    return Agreement("Krippendorff's alpha", krippendorff_alpha(units), len(units), equal)


# ---- what a reviewer sees ----


def order_for(session: Session, review_id: int, author: str) -> list[int]:
    """The drawn features in this reviewer's order, which the review's seed and the name decide."""
    seed = session.scalars(sa.select(Review.seed).where(Review.id == review_id)).one()
    drawn = session.scalars(
        sa.select(ReviewFeature.idx).where(ReviewFeature.review_id == review_id).order_by(ReviewFeature.idx)
    ).all()
    shuffled = np.random.default_rng([seed, zlib.crc32(author.encode())]).permutation(len(drawn))
    return [drawn[at] for at in shuffled]


def mine(session: Session, review_id: int, author: str) -> dict[int, RatingRecord]:
    """What this reviewer said so far, by index."""
    rows = session.scalars(sa.select(Rating).where(Rating.review_id == review_id, Rating.author == author))
    return {row.idx: _record(row) for row in rows}


def blind(page: FeaturePage, review_id: int, place: int, n: int, said: dict[int, RatingRecord]) -> BlindFeature:
    """The page without what would tell which feature it is, or what others say of it."""
    return BlindFeature(
        review=review_id,
        sae=page.sae.name,
        place=place,
        n=n,
        rated=len(said),
        rating=said.get(page.index),
        n_fired=page.n_fired,
        density=page.density,
        max_act=page.max_act,
        heads=page.heads,
        promoted=page.promoted,
        suppressed=page.suppressed,
        examples=page.examples,
    )


# ---- writing ----


def create(session: Session, door: Door, n: int, seed: int, author: str) -> int:
    """Draw `n` of the SAE's live features, each equally likely, the same for the same seed; the review's id."""
    if door.sae.harvest is None:
        raise UsageError(f"{door.sae.name} has no published harvest, so no feature is known to be alive.", field="n")
    alive = sa.select(Feature.idx).where(Feature.harvest_id == door.sae.harvest.id, Feature.n_fired > 0).order_by(Feature.idx)
    live = session.scalars(alive).all()
    if not 1 <= n <= min(len(live), MOST_DRAWN):
        most = min(len(live), MOST_DRAWN)
        raise UsageError(f"{n} features cannot be drawn; {door.sae.name} gives 1 to {most}.", field="n")
    row = Review(sae_id=door.id, harvest_id=door.sae.harvest.id, n_live=len(live), seed=seed, author=author)
    session.add(row)
    session.flush()
    chosen = np.random.default_rng(seed).choice(len(live), n, replace=False)
    session.add_all(ReviewFeature(review_id=row.id, idx=live[at]) for at in chosen)
    return row.id


def rate(session: Session, review_id: int, index: int, author: str, answer: str, label: str, note: str) -> None:
    """Keep what a person judges of a feature of the review; a later judgement takes the earlier one's place."""
    if answer not in ANSWERS:
        raise UsageError("Answer yes, maybe or no.", field="answer")
    if session.get(ReviewFeature, (review_id, index)) is None:
        raise NotFound(f"Feature {index} was not drawn for review {review_id}.", field="index")
    row = session.get(Rating, (review_id, index, author))
    if row is None:
        row = Rating(review_id=review_id, idx=index, author=author)
        session.add(row)
    row.answer, row.created_at = answer, now()
    row.label = one_line(label, "label", LONGEST_LABEL, field="label", empty=True)
    row.note = many_lines(note, "note", field="note", empty=True)


def keep_labels(session: Session, review_id: int, author: str) -> int:
    """Make the labels that a person gave in the review labels of the features; how many were new."""
    sae_id = sae_of(session, review_id)
    there = sa.select(Label.idx, Label.text).where(Label.sae_id == sae_id, Label.author == author, Label.ended_at.is_(None))
    held = {tuple(row) for row in session.execute(there)}
    new = [
        (idx, one.label) for idx, one in mine(session, review_id, author).items() if one.label and (idx, one.label) not in held
    ]
    for idx, text in new:
        add_label(session, sae_id, idx, text, author)
    return len(new)
