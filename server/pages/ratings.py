"""Blind reviews: `/saes/{sae}/reviews`, `/reviews/{id}` with its result, `/reviews/{id}/rate` one feature at a time."""

import secrets

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session

from sae_core.errors import NotFound, UsageError
from server.pages.reply import Read, link, reply
from server.pages.writing import Author, Form, Signed, number, reading, see, writing
from server.rendering import Paint
from server.store import ratings as store
from server.store.features import feature_page
from server.store.ratings import BlindFeature, ReviewPage, ReviewsPage
from server.store.saes import Door, find_sae, sae_by_id

router = APIRouter()

CONTEXT = 16


@router.get("/saes/{sae}/reviews", include_in_schema=False)
@router.get("/saes/{sae}/reviews.json", response_model=ReviewsPage)
def reviews_page(request: Request, sae: str, read: Read, author: Author) -> Response:
    """An SAE's reviews, and a form for a new one."""
    return show_all(request, read, sae, author)


def show_all(
    request: Request, read: Session, sae: str, author: str | None, trouble: str = "", typed: Form | None = None
) -> Response:
    """The page, after trouble with a sentence and what was typed."""
    door, status = find_sae(read, sae), 422 if trouble else 200
    page = store.reviews_page(read, door)
    typed = typed or {}
    return reply(request, page, "reviews.html", status=status, author=author, trouble=trouble, typed=typed, drawn=store.DRAWN)


@router.post("/saes/{sae}/reviews", include_in_schema=False)
def create(request: Request, sae: str, form: Form, author: Signed) -> Response:
    """Draw features for a new review."""
    try:
        n, seed = whole(form, "n", store.DRAWN), whole(form, "seed", secrets.randbelow(2**31))
        with writing(request) as session:
            review_id = store.create(session, find_sae(session, sae), n, seed, author)
    except UsageError as error:
        with reading(request) as read:
            return show_all(request, read, sae, author, str(error), form)
    return see(f"/reviews/{review_id}")


def whole(form: dict[str, str], field: str, otherwise: int) -> int:
    """A whole number that somebody typed; `otherwise` for an empty box."""
    text = form.get(field, "").strip()
    if not text:
        return otherwise
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"'{text[:40]}' is no whole number.", field=field)
    return int(text)


def door_of(read: Session, review_id: int) -> Door:
    """The SAE that is reviewed."""
    return sae_by_id(read, store.sae_of(read, review_id))


@router.get("/reviews/{review_id:int}", include_in_schema=False)
@router.get("/reviews/{review_id:int}.json", response_model=ReviewPage)
def review_page(request: Request, review_id: int, read: Read, author: Author, look: bool = False) -> Response:
    """A review: who is how far; and the result, which is kept from the page of one who has not rated everything."""
    page = store.review_page(read, door_of(read, review_id), review_id)
    done = next((one.rated for one in page.review.people if one.author == author), 0)
    hidden = not look and done < page.review.n
    mine = [one for feature in page.features for one in feature.ratings if one.author == author and one.label]
    return reply(request, page, "review.html", author=author, done=done, hidden=hidden, mine=mine, back=f"/reviews/{review_id}")


@router.get("/reviews/{review_id:int}/rate", include_in_schema=False)
@router.get("/reviews/{review_id:int}/rate.json", response_model=BlindFeature)
def rate_page(request: Request, review_id: int, read: Read, author: Signed, place: int | None = Query(None, ge=1)) -> Response:
    """One feature to rate; without a place, the first that is not rated yet."""
    return show(request, read, review_id, author, place)


def show(
    request: Request, read: Session, review_id: int, author: str, place: int | None, trouble: str = "", typed: Form | None = None
) -> Response:
    """The feature at the place, after trouble with a sentence and what was typed."""
    door = door_of(read, review_id)
    order, said = store.order_for(read, review_id, author), store.mine(read, review_id, author)
    if place is None:
        place = next((at for at, idx in enumerate(order, 1) if idx not in said), None)
        return see(f"/reviews/{review_id}" if place is None else link(f"/reviews/{review_id}/rate", place=place))
    if place > len(order):
        raise NotFound(f"Review {review_id} has {len(order)} features.", field="place")
    page = store.blind(feature_page(read, door, order[place - 1]), review_id, place, len(order), said)
    paint = Paint(page.max_act, None, CONTEXT)
    status = 422 if trouble else 200
    return reply(request, page, "rate.html", status=status, author=author, trouble=trouble, typed=typed or {}, paint=paint)


@router.post("/reviews/{review_id:int}/rate", include_in_schema=False)
def rate(request: Request, review_id: int, form: Form, author: Signed) -> Response:
    """Keep the rating, then on to the next feature that is not rated."""
    place = number(form, "place")
    try:
        with writing(request) as session:
            store.sae_of(session, review_id)
            order = store.order_for(session, review_id, author)
            if not 1 <= place <= len(order):
                raise NotFound(f"Review {review_id} has {len(order)} features.", field="place")
            said = form.get("answer", ""), form.get("label", ""), form.get("note", "")
            store.rate(session, review_id, order[place - 1], author, *said)
    except UsageError as error:
        with reading(request) as read:
            return show(request, read, review_id, author, place, str(error), form)
    return see(f"/reviews/{review_id}/rate")


@router.post("/reviews/{review_id:int}/labels", include_in_schema=False)
def keep_labels(request: Request, review_id: int, author: Signed) -> Response:
    """Make the visitor's labels of the review labels of the features."""
    with writing(request) as session:
        store.keep_labels(session, review_id, author)
    return see(f"/reviews/{review_id}")
