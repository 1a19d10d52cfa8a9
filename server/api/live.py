"""Live questions under `/api/v1`: what fires on a typed text, and which heads and source tokens make it fire."""

from fastapi import Request

from sae_core.errors import UsageError
from server.access import needs
from server.api.common import api_router, replies
from server.live import (
    ComponentsQuestion,
    FiringQuestion,
    LiveAttribution,
    LiveComponents,
    LiveFirings,
    LiveQuestion,
    TextQuestion,
)
from server.pages.feature import LONGEST_TEXT, engine
from server.pages.reply import Read
from server.store.features import check_index
from server.store.saes import find_sae

router = api_router("Live")
ASKS = replies(403, 404, 413, 415)


@router.post("/live/firings", responses=ASKS, summary="What fires on a text")
@needs("reader", live=True)
def firings(request: Request, question: FiringQuestion, read: Read) -> LiveFirings:
    """The strongest features at each position of a typed text and of all of it, and the activations of chosen ones. Asked of
    the engine, which loads the model on the first question; nothing is stored."""
    _checked(read, question, *question.features)
    return engine(request).firings(question)


@router.post("/live/attribution", responses=ASKS, summary="Which heads and tokens make a feature fire")
@needs("reader", live=True)
def attribution(request: Request, question: LiveQuestion, read: Read) -> LiveAttribution:
    """One feature's activations on a typed text, and its whole DFA at one destination: what each head and source token gave,
    with the bias terms the pre-activation, to within `gap`."""
    _checked(read, question, question.index)
    return engine(request).attribute(question)


@router.post("/live/components", responses=ASKS, summary="Which earlier parts of the model make a feature fire")
@needs("reader", live=True)
def components(request: Request, question: ComponentsQuestion, read: Read) -> LiveComponents:
    """The same DFA by component: what the embedding and each earlier attention and MLP put into each source."""
    _checked(read, question, question.index)
    return engine(request).components(question)


def _checked(read: Read, question: TextQuestion, *features: int) -> None:
    """Refuse, without the engine, what there is not and what is too long."""
    door = find_sae(read, question.sae)
    for index in features:
        check_index(door, index)
    if question.text is not None and len(question.text) > LONGEST_TEXT:
        raise UsageError(f"That is {len(question.text)} characters; at most {LONGEST_TEXT} can be tried at once.", field="text")
