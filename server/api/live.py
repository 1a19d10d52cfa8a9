"""Live questions under `/api/v1`: what fires on a typed text, and which heads and source tokens make it fire."""

from typing import Annotated

from fastapi import Path as InPath
from fastapi import Request
from sqlalchemy.orm import Session

from sae_core.errors import UsageError
from server.access import needs
from server.api.common import BriefRead, api_router, replies
from server.circuits.asked import CircuitQuestion, FeatureRoot, LiveCircuit
from server.live import (
    ComponentsQuestion,
    FiringQuestion,
    InLine,
    LiveAttribution,
    LiveComponents,
    LiveFirings,
    LivePrompt,
    LiveQuestion,
    LiveSteered,
    PromptQuestion,
    SteerQuestion,
    TextQuestion,
    Ticket,
)
from server.pages.feature import LONGEST_TEXT, engine
from server.store.features import check_index
from server.store.prompts import LONGEST
from server.store.saes import find_sae

router = api_router("Live")
ASKS = replies(403, 404, 413, 415)


@router.post("/live/firings", responses=ASKS, summary="What fires on a text")
@needs("reader", live=True)
def firings(request: Request, question: FiringQuestion, read: BriefRead) -> LiveFirings:
    """The strongest features at each position of a typed text and of all of it, and the activations of chosen ones. Asked of
    the engine, which loads the model on the first question; nothing is stored."""
    _checked(read, question, *question.features)
    return engine(request).firings(question)


@router.post("/live/attribution", responses=ASKS, summary="Which heads and tokens make a feature fire")
@needs("reader", live=True)
def attribution(request: Request, question: LiveQuestion, read: BriefRead) -> LiveAttribution:
    """One feature's activations on a typed text, and its whole DFA at one destination: what each head and source token gave,
    with the bias terms the pre-activation, to within `gap`."""
    _checked(read, question, question.index)
    return engine(request).attribute(question)


@router.post("/live/components", responses=ASKS, summary="Which earlier parts of the model make a feature fire")
@needs("reader", live=True)
def components(request: Request, question: ComponentsQuestion, read: BriefRead) -> LiveComponents:
    """The same DFA by component: what the embedding and each earlier attention and MLP put into each source."""
    _checked(read, question, question.index)
    return engine(request).components(question)


@router.post("/live/prompt", responses=ASKS, summary="What fires on a text in many SAEs")
@needs("reader", live=True)
def prompt(request: Request, question: PromptQuestion, read: BriefRead) -> LivePrompt:
    """A text through some SAEs of one model: how many features fire at each token and layer, the strongest of them, every one at
    a token `at`; the same of a second text `against`; and one `feature` taken apart by head and source, with what it writes to
    the next token's logits. Nothing is stored."""
    _checked_prompt(read, question)
    return engine(request).prompt(question)


@router.post("/live/steer", responses=ASKS, summary="What becomes of a text when features are changed")
@needs("reader", live=True)
def steer(request: Request, question: SteerQuestion, read: BriefRead) -> LiveSteered:
    """Features ablated (to zero, to their mean, or to what they are in another text), set, scaled or steered while the model
    reads, and z of layers or heads taken out, on several layers at once: the loss of each token, what comes next, which later
    features change, and how the text goes on, each as the model is and with the change. Nothing is stored."""
    _checked_steer(read, question)
    return engine(request).steer(question)


@router.post("/live/circuit", responses=ASKS, summary="What made a feature or a logit, from feature to feature")
@needs("reader", live=True)
def circuit(request: Request, question: CircuitQuestion, read: BriefRead) -> LiveCircuit:
    """Recursive direct feature attribution, patterns and norms frozen: from a feature at a token, a logit or a logit difference
    back through the features of earlier attention layers, and of MLPs where the model has transcoders of them, with errors, MLPs
    that stay whole, embeddings and biases. Each node's edges and `rest` sum to its value. With `score`, why one head looked from
    one token to another, in pairs of features. Nothing is stored."""
    _checked_circuit(read, question)
    return engine(request).circuit(question)


InTheLine = Annotated[Ticket, InPath(description="A random word of yours.", examples=["k3J_0aQ9zXw2Lr7T"])]


@router.put("/live/line/{ticket}", responses=ASKS, summary="Ask a prompt without waiting for it")
@needs("reader", live=True)
def leave_prompt(request: Request, ticket: InTheLine, question: PromptQuestion, read: BriefRead) -> InLine:
    """The same question, put in the engine's line under a ticket. It comes with its answer where that is there at once, else
    with the number of questions before it. One that nobody asks about for half a minute is dropped."""
    _checked_prompt(read, question)
    return engine(request).leave(ticket, question, 0.0)


@router.put("/live/line/{ticket}/steer", responses=ASKS, summary="Ask what becomes of a text without waiting for it")
@needs("reader", live=True)
def leave_steer(request: Request, ticket: InTheLine, question: SteerQuestion, read: BriefRead) -> InLine:
    """The question of `/live/steer`, put in the engine's line under a ticket, as a prompt is; looked for and cancelled alike."""
    _checked_steer(read, question)
    return engine(request).leave_steer(ticket, question, 0.0)


@router.put("/live/line/{ticket}/circuit", responses=ASKS, summary="Ask for a circuit without waiting for it")
@needs("reader", live=True)
def leave_circuit(request: Request, ticket: InTheLine, question: CircuitQuestion, read: BriefRead) -> InLine:
    """As a prompt is asked without waiting; the answer then comes as `circuit`."""
    _checked_circuit(read, question)
    return engine(request).leave_circuit(ticket, question, 0.0)


@router.get("/live/line/{ticket}", responses=replies(403, 404), summary="A question's place in the line, or its answer")
@needs("reader")
def look_for_prompt(request: Request, ticket: InTheLine) -> InLine:
    """Where it is. Waits for up to a second for the answer."""
    return engine(request).look(ticket, 1.0)


@router.delete("/live/line/{ticket}", responses=replies(403, 404), summary="Cancel a question")
@needs("reader")
def cancel_prompt(request: Request, ticket: InTheLine) -> InLine:
    """Take it out of the line; one under way ends at its next step."""
    engine(request).cancel(ticket)
    return InLine(ticket=ticket, place=None, answer=None)


def _checked_prompt(read: Session, question: PromptQuestion) -> None:
    for name in question.saes:
        door = find_sae(read, name)
        if question.feature is not None and question.feature.sae == name:
            check_index(door, question.feature.index)
    for text in (question.text or "", question.against or ""):
        if len(text) > LONGEST:
            raise UsageError(f"That is {len(text)} characters; at most {LONGEST} can be tried at once.", field="text")


def _checked_steer(read: Session, question: SteerQuestion) -> None:
    for name in question.watch:
        find_sae(read, name)
    for one in question.features:
        check_index(find_sae(read, one.sae), one.index)
    for text in (question.text or "", question.other or ""):
        if len(text) > LONGEST:
            raise UsageError(f"That is {len(text)} characters; at most {LONGEST} can be tried at once.", field="text")


def _checked_circuit(read: Session, question: CircuitQuestion) -> None:
    for name in question.saes:
        door = find_sae(read, name)
        if isinstance(question.root, FeatureRoot) and question.root.sae == name:
            check_index(door, question.root.index)
    if len(question.text or "") > LONGEST:
        raise UsageError(f"That is {len(question.text or '')} characters; at most {LONGEST} can be tried at once.", field="text")


def _checked(read: Session, question: TextQuestion, *features: int) -> None:
    """Refuse, without the engine, what there is not and what is too long."""
    door = find_sae(read, question.sae)
    for index in features:
        check_index(door, index)
    if question.text is not None and len(question.text) > LONGEST_TEXT:
        raise UsageError(f"That is {len(question.text)} characters; at most {LONGEST_TEXT} can be tried at once.", field="text")
