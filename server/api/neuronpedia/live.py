"""Typed text, asked of the engine: `/api/activation/new`, `/api/activation/source`, `/api/search-all`,
`/api/search-topk-by-token`."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import Field, model_validator

from server.api.neuronpedia.wire import Addresses, At, Shape, answer, utc
from server.live import LiveAttribution, LiveQuestion
from server.pages.feature import engine
from server.pages.reply import Read
from server.store.features import check_index
from server.store.sources import find_source

router = Addresses()

LONGEST = 100_000
"""Characters of a text; how many tokens are taken, the engine says."""
AT_ONCE = 32
"""Texts of one request."""
Typed = Annotated[str, Field(min_length=1, max_length=LONGEST)]
Texts = Typed | Annotated[list[Typed], Field(min_length=1, max_length=AT_ONCE)]


class TextFor(Shape):
    """Text for one feature."""

    feature: At
    custom_text: Texts
    ignore_bos: bool = False
    """Leave the row start out of the answer."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, given: Any) -> Any:
        # Scripts say `neuron` for `feature`, and `source` for `layer`.
        if not isinstance(given, dict):
            return given
        feature = given.get("neuron") or given.get("feature")
        if isinstance(feature, dict) and not feature.get("layer") and feature.get("source"):
            feature = {**feature, "layer": feature["source"]}
        return {**given, "feature": feature}


class TestedRow(Shape):
    """What one feature does on a text. Every index counts from the first of `tokens`."""

    tokens: list[str]
    values: list[float]
    max_value: float
    min_value: float
    max_value_token_index: int
    model_id: str
    layer: str
    index: str
    creator_id: str = ""
    data_index: None = None
    data_source: str = "Headscope"
    created_at: datetime
    dfa_values: list[float]
    dfa_target_index: int
    """The destination, always."""
    dfa_max_value: float


@router.post_at("/activation/new")
def new_activation(request: Request, given: TextFor, read: Read) -> Response:
    """One feature on typed text, and what each source token gave where it is strongest."""
    at = given.feature
    source = find_source(read, at.model_id, at.layer)
    check_index(source.door, at.index)
    texts = [given.custom_text] if isinstance(given.custom_text, str) else given.custom_text
    asked = engine(request)
    rows = [
        tested_row(at, asked.attribute(LiveQuestion(sae=source.door.sae.name, index=at.index, text=text)), given.ignore_bos)
        for text in texts
    ]
    return answer(rows[0] if isinstance(given.custom_text, str) else rows)


def tested_row(at: At, found: LiveAttribution, ignore_bos: bool) -> TestedRow:
    """The engine's answer, without the row start if asked so."""
    first = 1 if ignore_bos else 0
    values, given = found.activations[first:], [sum(column) for column in zip(*found.dfa, strict=True)][first:]
    strongest = max(values)
    return TestedRow(
        tokens=found.texts[first:], values=values, max_value=strongest, min_value=min(values),
        max_value_token_index=values.index(strongest), model_id=at.model_id, layer=at.layer, index=str(at.index),
        created_at=utc(None), dfa_values=given, dfa_target_index=max(0, found.dest - first), dfa_max_value=max(given),
    )  # fmt: skip
