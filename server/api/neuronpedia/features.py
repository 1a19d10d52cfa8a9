"""Features, their examples and their SAEs: `/api/feature`, `/api/features`, `/api/features-offset`, `/api/activation/get`,
`/api/source-set`."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import Body, Response
from pydantic import Field
from sqlalchemy.orm import Session

from sae_core.errors import NotFound
from server.access import needs
from server.api.neuronpedia.shapes import (
    NeuronOfSet,
    NeuronRow,
    NeuronWithModel,
    SourceRow,
    SourceSetRow,
    SourceSetWithSources,
    activation_row,
    model_row,
    neuron_fields,
    neuron_row,
    set_row,
    source_row,
)
from server.api.neuronpedia.wire import OURS, Addresses, At, Index, Name, Shape, answer, index_of, utc
from server.pages.reply import Read
from server.store.features import check_index
from server.store.lists import lists_with
from server.store.neurons import live_indices, neurons, notes_of
from server.store.saes import sae_by_id
from server.store.sources import Source, SourceRef, find_set, find_source

router = Addresses()

PAGE = 25
"""Features that `/api/features-offset` gives at once, as many as Neuronpedia's."""
MOST = 200
"""Features that `/api/features` gives at once."""


class CommentRow(Shape):
    """A note."""

    id: str
    model_id: str
    layer: str
    index: str
    text: str
    user_id: str
    user: dict[str, str]
    created_at: datetime


class ListOfNeuron(Shape):
    """A list that a feature is in."""

    model_id: str
    layer: str
    index: str
    list_id: str
    description: str
    added_at: datetime
    user_id: str
    list: dict[str, str]


class WholeNeuron(NeuronWithModel):
    """A feature with everything around it."""

    creator: dict[str, str] = {"name": OURS}
    source: SourceRow
    source_set: SourceSetRow
    comments: list[CommentRow]
    lists: list[ListOfNeuron]


@router.get_at("/feature/{model_id:path}/{layer}/{index}")
def feature(model_id: str, layer: str, index: str, read: Read) -> Response:
    """One feature with its examples and labels."""
    return answer(whole(read, find_source(read, model_id, layer), index_of(index)))


def whole(read: Session, source: Source, index: int) -> WholeNeuron:
    """The feature, or NotFound."""
    ref, door = source.ref, source.door
    check_index(door, index)
    found = neurons(read, door, [index]).get(index)
    if found is None:
        raise NotFound(f"Feature {index} of {ref.id} is not in its published harvest.", field="index")
    at = {"model_id": ref.model_id, "layer": ref.id, "index": str(index)}
    return WholeNeuron(
        **neuron_fields(source, found),
        model=model_row(ref),
        source=source_row(ref, door),
        source_set=set_row(ref, door),
        comments=[
            CommentRow(
                **at, id=str(note.id), text=note.text, user_id=note.author, user={"name": note.author},
                created_at=utc(note.created_at),
            )
            for note in notes_of(read, door, index)
        ],
        lists=[
            ListOfNeuron(
                **at, list_id=str(one.list.id), description=one.note, added_at=utc(one.created_at), user_id=one.author,
                list={"id": str(one.list.id), "name": one.list.name, "description": one.list.description},
            )
            for one in lists_with(read, door.id, index)
        ],
    )  # fmt: skip


class Wanted(At):
    """A feature of a batch."""

    max_acts_to_return: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Its strongest examples only."""


@router.post_at("/features")
@needs("anonymous")
def features(wanted: Annotated[list[Wanted], Body(max_length=MOST)], read: Read) -> Response:
    """Features of any SAEs, in the order asked for; indices that are not there are left out."""
    return answer(_batch(read, wanted))


def _batch(read: Session, wanted: list[Wanted]) -> list[NeuronRow]:
    named = dict.fromkeys((one.model_id, one.layer) for one in wanted)
    sources = {(model_id, layer): find_source(read, model_id, layer) for model_id, layer in named}
    rows: dict[tuple[str, str, int], NeuronRow] = {}
    for (model_id, layer), source in sources.items():
        mine = [one for one in wanted if (one.model_id, one.layer) == (model_id, layer)]
        for most in {one.max_acts_to_return for one in mine}:
            found = neurons(read, source.door, [one.index for one in mine if one.max_acts_to_return == most], most)
            rows.update({(model_id, layer, index): neuron_row(source, neuron) for index, neuron in found.items()})
    keys = dict.fromkeys((one.model_id, one.layer, one.index) for one in wanted)
    return [rows[key] for key in keys if key in rows]


class PageOf(Shape):
    """A page of an SAE's features."""

    model_id: Name
    layer: Name
    offset: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


@router.post_at("/features-offset")
@needs("anonymous")
def features_offset(page: PageOf, read: Read) -> Response:
    """The next `PAGE` features that fired, in the order of their index."""
    source = find_source(read, page.model_id, page.layer)
    indices = live_indices(read, source.door, page.offset or 0, PAGE)
    found = neurons(read, source.door, indices)
    model, of_set = model_row(source.ref), set_row(source.ref, source.door)
    rows = (neuron_fields(source, found[index]) for index in indices)
    return answer([NeuronOfSet(**fields, model=model, source_set=of_set) for fields in rows])


class ExamplesOf(Shape):
    """A feature, by the names that `/api/activation/get` takes."""

    model_id: Name
    source: Name
    index: Index


@router.post_at("/activation/get")
@needs("anonymous")
def activations(of: ExamplesOf, read: Read) -> Response:
    """A feature's examples, the strongest first."""
    source = find_source(read, of.model_id, of.source)
    check_index(source.door, of.index)
    found = neurons(read, source.door, [of.index]).get(of.index)
    if found is None or not found.firings:
        raise NotFound(f"Feature {of.index} of {of.source} has no examples.", field="index")
    return answer([activation_row(source, of.index, firing) for firing in found.firings])


@router.get_at("/source-set/{model_id:path}/{name}")
def source_set(model_id: str, name: str, read: Read) -> Response:
    """SAEs of one name, by layer."""
    refs = find_set(read, model_id, name)
    doors = [sae_by_id(read, ref.sae_id) for ref in refs]
    first = set_row(refs[0], doors[0])
    sources = [source_row(ref, door) for ref, door in zip(refs, doors, strict=True)]
    return answer(SourceSetWithSources(**first.model_dump(), sources=sources, model=model_row(refs[0])))


def batch(read: Session, wanted: Sequence[tuple[SourceRef, int]], most: int) -> dict[tuple[int, int], NeuronRow]:
    """Features by the numbers of their SAEs and their indices, as far as published harvests have them."""
    by_sae: dict[int, list[tuple[SourceRef, int]]] = defaultdict(list)
    for ref, index in wanted:
        by_sae[ref.sae_id].append((ref, index))
    rows = {}
    for sae_id, mine in by_sae.items():
        source = Source(mine[0][0], sae_by_id(read, sae_id))
        if source.door.sae.harvest is not None:
            found = neurons(read, source.door, [index for _, index in mine], most)
            rows.update({(sae_id, index): neuron_row(source, neuron) for index, neuron in found.items()})
    return rows
