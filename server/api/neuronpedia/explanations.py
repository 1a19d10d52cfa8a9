"""Labels as explanations: `/api/explanation/...`, and those that come with `/api/feature/upload-batch`."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import Field
from sqlalchemy.orm import Session

from sae_core.errors import UsageError
from server.access import needs
from server.api.neuronpedia.collections import Signed
from server.api.neuronpedia.features import batch
from server.api.neuronpedia.shapes import HUMAN, NeuronRow
from server.api.neuronpedia.wire import Addresses, At, Index, Name, Shape, answer
from server.pages.reply import Read, feature_path, origin
from server.pages.writing import writing
from server.store.explanations import search_labels
from server.store.features import check_index
from server.store.labels import PERSON, add_label
from server.store.sources import SourceRef, every_ref, find_ref, find_source

router = Addresses()

PAGE = 20
"""Explanations that a search gives at once, as many as Neuronpedia's."""
CARDS = 3
"""Examples of each feature found."""


class Query(Shape):
    """What to look for, in all SAEs."""

    query: Annotated[str, Field(min_length=3, max_length=1000)]
    offset: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


class QueryInModel(Query):
    """What to look for in the SAEs of a model."""

    model_id: Name


class QueryInSources(QueryInModel):
    """What to look for in some SAEs."""

    layers: Annotated[list[Name], Field(min_length=1, max_length=200)]


class FoundRow(Shape):
    """An explanation that a search found."""

    model_id: str
    layer: str
    index: str
    description: str
    explanation_model_name: str | None
    type_name: str
    cosine_similarity: float
    """Of counts of words, not of embeddings."""
    neuron: NeuronRow | None


@router.post_at("/explanation/search")
@needs("anonymous")
def search(query: QueryInSources, read: Read) -> Response:
    """Labels in some SAEs, the nearest first."""
    return _found(read, query, [find_ref(read, query.model_id, layer) for layer in dict.fromkeys(query.layers)])


@router.post_at("/explanation/search-model")
@needs("anonymous")
def search_model(query: QueryInModel, read: Read) -> Response:
    """Labels in all SAEs of a model, the nearest first."""
    return _found(read, query, every_ref(read, query.model_id))


@router.post_at("/explanation/search-all")
@needs("anonymous")
def search_all(query: Query, read: Read) -> Response:
    """Labels in all SAEs, the nearest first."""
    return _found(read, query, every_ref(read))


def _found(read: Session, query: Query, refs: Sequence[SourceRef]) -> Response:
    by_sae = {ref.sae_id: ref for ref in refs}
    offset = query.offset or 0
    near = search_labels(read, list(by_sae), query.query, offset, PAGE + 1)
    shown = near[:PAGE]
    neurons = batch(read, [(by_sae[one.sae_id], one.index) for one in shown], CARDS)
    rows = []
    for one in shown:
        ref, person = by_sae[one.sae_id], one.method == PERSON
        rows.append(
            FoundRow(
                model_id=ref.model_id, layer=ref.id, index=str(one.index), description=one.text,
                explanation_model_name=None if person else one.method, type_name=HUMAN if person else one.method,
                cosine_similarity=one.cosine, neuron=neurons.get((one.sae_id, one.index)),
            )
        )  # fmt: skip
    more = len(near) > PAGE
    after = {"nextOffset": offset + PAGE} if more else {}
    asked = query.model_dump(by_alias=True, exclude_none=True)
    return answer({"request": asked, "results": rows, "resultsCount": len(rows), "hasMore": more, **after})


@router.get_at("/explanation/export")
def export(request: Request) -> Response:
    """Neuronpedia gives its exports elsewhere, and says so with a 400; where ours are."""
    url = f"{origin(request)}/labels.json"
    said = {"newUrl": url, "message": f"Labels are listed at {url}.", "error": f"Labels are listed at {url}."}
    response = answer(said)
    response.status_code = 400
    return response


# ---- writing ----


class Explanation(At):
    """An explanation of a feature."""

    explanation: str
    explanation_model: Annotated[str, Field(max_length=60)] | None = None


class NewExplanation(Shape):
    """What `/api/explanation/new` takes."""

    feature: Explanation


@router.post_at("/explanation/new")
def new(request: Request, given: NewExplanation, author: Signed) -> Response:
    """Give a feature a label; one by a model is told from a person's."""
    at = given.feature
    with writing(request) as session:
        source = find_source(session, at.model_id, at.layer)
        check_index(source.door, at.index)
        add_label(session, source.door.id, at.index, at.explanation, author, method=at.explanation_model or PERSON)
        path = feature_path(source.door.sae.name, at.index)
    return answer({"message": "Explanation created.", "url": f"{origin(request)}{path}"})


class UploadedExplanation(Shape):
    """An explanation among a feature's."""

    text: str
    method_name: Annotated[str, Field(max_length=60)] | None = None
    model_name: Annotated[str, Field(max_length=60)] | None = None


class UploadedFeature(Shape):
    """A feature of a batch: of one that a harvest found, only explanations are taken."""

    index: Index
    density: float | None = None
    explanations: list[UploadedExplanation] | None = None
    activations: list[Any] | None = None
    top_logits: list[Any] | None = None
    bottom_logits: list[Any] | None = None

    def refused(self) -> str | None:
        """The first field that a harvest alone gives."""
        fields = ("density", "activations", "top_logits", "bottom_logits")
        return next((field for field in fields if getattr(self, field) not in (None, [])), None)


class Upload(Shape):
    """What `/api/feature/upload-batch` takes."""

    model_id: Name
    source: Name
    features: Annotated[list[UploadedFeature], Field(min_length=1, max_length=128)]


@router.post_at("/feature/upload-batch")
def upload(request: Request, given: Upload, author: Signed) -> Response:
    """Explanations for features that are there: all are taken, or none."""
    n = 0
    with writing(request) as session:
        source = find_source(session, given.model_id, given.source)
        for feature in given.features:
            if (field := feature.refused()) is not None:
                raise UsageError(
                    f"Feature {feature.index} comes with {field}, which a harvest gives and nobody else; send explanations only.",
                    field=field,
                )
            check_index(source.door, feature.index)
            for one in feature.explanations or ():
                method = one.model_name or one.method_name or PERSON
                add_label(session, source.door.id, feature.index, one.text, author, method=method)
                n += 1
    return answer({"message": f"{n} explanations created."})
