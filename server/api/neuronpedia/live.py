"""Typed text, asked of the engine: `/api/activation/new`, `/api/activation/source`, `/api/search-all`,
`/api/search-topk-by-token`, `/api/steer`."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator, model_validator
from sqlalchemy.orm import Session

from sae_core.errors import UsageError
from server.access import needs
from server.api.neuronpedia.features import batch
from server.api.neuronpedia.shapes import NeuronRow, NeuronWithModel, model_row
from server.api.neuronpedia.wire import Addresses, At, Name, Shape, answer, utc
from server.live import (
    FeatureChanged,
    Live,
    LiveAttribution,
    LiveCodes,
    LiveQuestion,
    SourcesQuestion,
    SteerQuestion,
    TextQuestion,
)
from server.pages.feature import engine
from server.pages.reply import Read
from server.store.features import check_index
from server.store.neurons import densities
from server.store.saes import sae_by_id
from server.store.sources import Source, find_ref, find_set, find_source

router = Addresses()

LONGEST = 100_000
"""Characters of a text; how many tokens are taken, the engine says."""
AT_ONCE = 32
"""Texts of one request."""
STRONGEST = 1e4
"""Of a feature's decoder direction that is added."""
Typed = Annotated[str, Field(min_length=1, max_length=LONGEST)]
Texts = Typed | Annotated[list[Typed], Field(min_length=1, max_length=AT_ONCE)]


def many(texts: str | list[str]) -> list[str]:
    """The texts of a request for one or for several."""
    return [texts] if isinstance(texts, str) else texts


def share(threshold: float | None) -> float | None:
    """The largest density that is shown; None for all. Neuronpedia takes -1 and 0 for that."""
    if threshold is None or threshold in (0, -1):
        return None
    if not 0 < threshold < 1:
        raise UsageError("densityThreshold is a share of tokens between 0 and 1, or -1 for none.", field="densityThreshold")
    return threshold


def default_for_null(cls: type[Shape], given: Any, info: ValidationInfo) -> Any:
    """What a field is where JSON says null: scripts send it for what they do not set."""
    return cls.model_fields[str(info.field_name)].default if given is None else given


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
@needs("reader", live=True)
def new_activation(request: Request, given: TextFor, read: Read) -> Response:
    """One feature on typed text, and what each source token gave where it is strongest."""
    at = given.feature
    source = find_source(read, at.model_id, at.layer)
    check_index(source.door, at.index)
    asked = engine(request)
    rows = [
        tested_row(at, asked.attribute(LiveQuestion(sae=source.door.sae.name, index=at.index, text=text)), given.ignore_bos)
        for text in many(given.custom_text)
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


# ---- everything that fires ----


class TextForSource(Shape):
    """Text for all features of one SAE."""

    model_id: Name
    source: Name
    custom_text: Texts


@router.post_at("/activation/source")
@needs("reader", live=True)
def source_activations(request: Request, given: TextForSource, read: Read) -> Response:
    """Every feature that fires on each text: `{index: [[position, activation], ...]}`."""
    source = find_ref(read, given.model_id, given.source)
    results = []
    for text in many(given.custom_text):
        codes = engine(request).codes(TextQuestion(sae=source.name, text=text))
        active: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for position, index, activation in sorted(zip(codes.positions, codes.features, codes.activations, strict=True)):
            active[str(index)].append((position, activation))
        results.append({"tokens": codes.texts, "activeFeatures": active})
    return answer({"results": results})


class Search(Shape):
    """Text for all features of the SAEs of a set."""

    model_id: Name
    source_set: Name
    text: Texts
    selected_layers: Annotated[list[Name], Field(max_length=200)] = []
    """Ids of sources; all of the set where there is none."""
    sort_indexes: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=100)] = []
    """Positions whose activations are summed to sort by; the largest of any position where there is none."""
    ignore_bos: bool = True
    """The row start is no destination here, so nothing fires on it either way."""
    density_threshold: float | None = None
    """Leave out features that fire on a larger share of tokens; -1 or 0 leaves out none."""
    num_results: Annotated[int, Field(ge=1, le=100)] = 50

    _given = field_validator("num_results", "sort_indexes", "selected_layers", "ignore_bos", mode="before")(default_for_null)


class FoundRow(Shape):
    """A feature that fires on a text."""

    model_id: str
    layer: str
    index: str
    values: list[float]
    max_value: float
    max_value_index: int
    dfa_values: list[float]
    dfa_target_index: int
    """The destination: where the feature is strongest."""
    dfa_max_value: float
    neuron: NeuronWithModel | None = None


class Strong(NamedTuple):
    """A feature that fires on a text."""

    score: float
    source: Source
    feature: int
    values: NDArray[np.float64]
    """[position]"""

    @property
    def dest(self) -> int:
        """Where it is strongest."""
        return int(self.values.argmax())


@router.post_at("/search-all")
@needs("reader", live=True)
def search_all(request: Request, search: Search, read: Read) -> Response:
    """The features that are strongest on a text, over the SAEs of a set."""
    layers = dict.fromkeys(search.selected_layers)
    if layers:
        sources = [find_source(read, search.model_id, layer) for layer in layers]
    else:
        sources = [Source(ref, sae_by_id(read, ref.sae_id)) for ref in find_set(read, search.model_id, search.source_set)]
    single = isinstance(search.text, str)
    results = [_strongest(request, search, read, sources, text, whole=single) for text in many(search.text)]
    return answer(results[0] if single else {"results": results})


def _strongest(
    request: Request, search: Search, read: Session, sources: Sequence[Source], text: str, *, whole: bool
) -> dict[str, Any]:
    asked, strong, tokens, texts = engine(request), [], [0], [""]
    for source in sources:
        codes = asked.codes(TextQuestion(sae=source.door.sae.name, text=text))
        tokens, texts = codes.tokens, codes.texts
        if (last := max(search.sort_indexes, default=0)) >= len(texts):
            raise UsageError(f"The text has the positions 0 to {len(texts) - 1}; there is no {last}.", field="sortIndexes")
        mine = _scored(source, codes, search.sort_indexes)
        if (densest := share(search.density_threshold)) is not None:
            # What is too dense is left out before the best are taken, so that as many come as were asked for.
            known = densities(read, source.door, [one.feature for one in mine])
            mine = [one for one in mine if known.get(one.feature, 0) <= densest]
        strong += mine
    strong = sorted(strong, key=lambda one: -one.score)[: search.num_results]
    given = _sources_of(asked, strong, tokens)
    neurons = batch(read, [(one.source.ref, one.feature) for one in strong], 1) if whole else {}
    rows = []
    for one in strong:
        ref = one.source.ref
        dfa, neuron = given[ref.sae_id, one.feature], neurons.get((ref.sae_id, one.feature))
        rows.append(
            FoundRow(
                model_id=ref.model_id, layer=ref.id, index=str(one.feature), values=one.values.tolist(),
                max_value=float(one.values[one.dest]), max_value_index=one.dest, dfa_values=dfa, dfa_target_index=one.dest,
                dfa_max_value=max(dfa),
                neuron=None if neuron is None else NeuronWithModel(**dict(neuron), model=model_row(ref)),
            )
        )  # fmt: skip
    return {"tokens": texts, "result": rows, "sortIndexes": search.sort_indexes}


def _scored(source: Source, codes: LiveCodes, at: Sequence[int]) -> list[Strong]:
    """Every feature that fires, by its largest activation, or by the sum of those at some positions."""
    indices, place = np.unique(np.array(codes.features, np.int64), return_inverse=True)
    values = np.zeros((len(indices), len(codes.tokens)))
    values[place, np.array(codes.positions, np.int64)] = codes.activations
    scores = values[:, list(at)].sum(1) if at else values.max(1, initial=0)
    fires = np.flatnonzero(scores > 0).tolist()
    return [Strong(float(scores[i]), source, int(indices[i]), values[i]) for i in fires]


def _sources_of(asked: Live, strong: Sequence[Strong], tokens: list[int]) -> dict[tuple[int, int], list[float]]:
    """What each source token gave to each feature where it is strongest, by the SAE's number and the feature's index: one
    question for each SAE."""
    found = {}
    for source in {one.source.ref.sae_id: one.source for one in strong}.values():
        sae_id = source.ref.sae_id
        mine = [one for one in strong if one.source.ref.sae_id == sae_id]
        features, dests = [one.feature for one in mine], [one.dest for one in mine]
        question = SourcesQuestion(sae=source.door.sae.name, tokens=tokens, features=features, dests=dests)
        given = asked.sources(question).given
        found.update({(sae_id, one.feature): row for one, row in zip(mine, given, strict=True)})
    return found


# ---- the strongest at each token ----


class SearchByToken(Shape):
    """Text for all features of one SAE, token by token."""

    model_id: Name
    source: Name
    text: Texts
    num_results: Annotated[int, Field(ge=1, le=20)] = 10
    """Features of each token."""
    ignore_bos: bool = True
    """Leave the row start out of the answer."""
    density_threshold: float | None = 0.01
    """Leave out features that fire on a larger share of tokens, and those of which it is not known; -1 or 0 leaves out none."""

    _given = field_validator("num_results", "ignore_bos", mode="before")(default_for_null)


class TopFeature(Shape):
    """A feature at a token."""

    activation_value: float
    feature_index: int
    feature: NeuronRow | None = None


class TokenRow(Shape):
    """The strongest features at a token."""

    position: int
    token: str
    is_special: bool
    top_features: list[TopFeature]


@router.post_at("/search-topk-by-token")
@needs("reader", live=True)
def search_by_token(request: Request, search: SearchByToken, read: Read) -> Response:
    """The features that are strongest at each token of a text."""
    source = find_source(read, search.model_id, search.source)
    single = isinstance(search.text, str)
    results = [
        {"source": search.source, "results": _by_token(request, search, read, source, text, whole=single)}
        for text in many(search.text)
    ]
    return answer(results[0] if single else {"results": results})


def _by_token(
    request: Request, search: SearchByToken, read: Session, source: Source, text: str, *, whole: bool
) -> list[TokenRow]:
    codes = engine(request).codes(TextQuestion(sae=source.door.sae.name, text=text))
    at: list[list[tuple[float, int]]] = [[] for _ in codes.tokens]
    for position, index, activation in zip(codes.positions, codes.features, codes.activations, strict=True):
        at[position].append((activation, index))
    if (densest := share(search.density_threshold)) is not None:
        known = densities(read, source.door, sorted(set(codes.features)))
        at = [[one for one in fires if known.get(one[1], 1) <= densest] for fires in at]
    at = [sorted(fires, key=lambda one: (-one[0], one[1]))[: search.num_results] for fires in at]
    shown = sorted({index for fires in at for _, index in fires})
    found = batch(read, [(source.ref, index) for index in shown], 0) if whole else {}
    rows = [
        TokenRow(
            position=position,
            token=codes.texts[position],
            is_special=codes.tokens[position] == codes.tokens[0],
            top_features=[
                TopFeature(activation_value=value, feature_index=index, feature=found.get((source.ref.sae_id, index)))
                for value, index in fires
            ],
        )
        for position, fires in enumerate(at)
    ]
    return [row for row in rows if not (search.ignore_bos and row.is_special)]


# ---- steering ----


class Steered(At):
    """A feature, and how much of its decoder direction is added."""

    strength: float


class Steer(Shape):
    """A text that the model goes on with, as it is and steered."""

    model_id: Name
    prompt: Typed
    features: Annotated[list[Steered], Field(min_length=1, max_length=32)]
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    n_tokens: Annotated[int, Field(ge=1, le=100)] = 32
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    strength_multiplier: float = 1.0
    steer_method: Literal["SIMPLE_ADDITIVE"] = "SIMPLE_ADDITIVE"
    stream: Literal[False] = False

    _given = field_validator("temperature", "n_tokens", "seed", "strength_multiplier", "steer_method", "stream", mode="before")(
        default_for_null
    )


class SteeredTexts(Shape):
    """Both texts, the prompt included."""

    steered: Annotated[str, Field(alias="STEERED")]
    default: Annotated[str, Field(alias="DEFAULT")]
    steered_log_probs: None = None
    default_log_probs: None = None
    id: str = ""
    share_url: None = None
    limit: None = None


@router.post_at("/steer")
@needs("reader", live=True)
def steer(request: Request, given: Steer, read: Read) -> Response:
    """How the model goes on, as it is and with features steered everywhere. Nothing is stored, so there is nothing to share."""
    changed = []
    for one in given.features:
        source = find_source(read, one.model_id, one.layer)
        check_index(source.door, one.index)
        value = one.strength * given.strength_multiplier
        if not abs(value) <= STRONGEST:
            raise UsageError(f"strength times strength_multiplier is at most {STRONGEST:g} either way.", field="features")
        changed.append(FeatureChanged(sae=source.door.sae.name, index=one.index, value=value))
    found = engine(request).steer(
        SteerQuestion(
            features=changed, text=given.prompt, most=0, new_tokens=given.n_tokens, temperature=given.temperature, seed=given.seed
        )
    )
    return answer(SteeredTexts(steered=given.prompt + found.changed.text, default=given.prompt + found.plain.text))
