"""What a harvest says of each head of an SAE's site, of one head at length, and of every head of a model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound, UsageError
from server.packing import read_examples
from server.store.features import FeatureQuery, FeatureRow, feature_table
from server.store.kept import kept
from server.store.saes import Count, Door, SaeRef, newest_of_each_layer
from server.tables import Example, Feature, HeadSummary, Model, Study

TOP = 10
"""Features that a head's page lists by each share, as the paper's own pages do."""
DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 8192)
"""Edges of the bars of distance, in tokens back: the destination itself, the token before, then doubling."""
UNCLEAR = "unclear"


@dataclass(frozen=True)
class HeadFeature:
    """A feature and the share of its decoder's norm that lies at the head."""

    index: int
    share: float
    """Of its decoder's norm, 0 to 1."""


@dataclass(frozen=True)
class HeadLine:
    """A head: what it leads, of what families, and how many things it seems to do."""

    head: int
    n_led: int
    """Live features of which it has the largest |mean DFA|."""
    n_led_norm: int
    """Live features of which it has the largest decoder norm."""
    families: tuple[Count, ...]
    """Of those it leads by |mean DFA|, most first, equal ones by name; `unclear` for those of none."""
    diversity: float | None
    """Directions that its features write into as if equally, weighed by how much each is there; None where few are alive."""
    polysemantic: float | None
    """Share of pairs of its top features that nothing measured relates: an upper estimate."""
    top: tuple[HeadFeature, ...]
    """Its live features with the largest decoder share."""
    detail: dict[str, Any]
    """The numbers behind the two, and how they hold up on more features."""

    @property
    def family(self) -> Count | None:
        """The family of most of the features it leads, `unclear` left out."""
        return next((count for count in self.families if count.key != UNCLEAR), None)


@dataclass(frozen=True)
class StudiedHead:
    """What the newest study of the model's heads found of one."""

    study: int
    """Id of the study."""
    role: str
    """What it was found to do."""
    best: float
    """Its largest share of attention to induction targets, over the lengths of the prefix."""
    previous: float | None
    """Mean attention to the token before."""
    duplicate: float | None
    """Mean attention to the earlier copy of the token itself."""


@dataclass(frozen=True)
class Span:
    """A bar of distance: `low` <= tokens back < `high`."""

    low: int
    high: int
    value: float


@dataclass(frozen=True)
class HeadPage:
    """One head of an SAE's site."""

    sae: SaeRef
    """Which SAE."""
    head: int
    n_layer_heads: int
    """Heads of the layer."""
    line: HeadLine | None
    """None in harvests made before heads were summarised."""
    layer: tuple[HeadLine, ...]
    """All heads of the layer, to compare with."""
    by_weights: tuple[FeatureRow, ...]
    """Live features by share of the decoder's norm, largest first."""
    by_data: tuple[FeatureRow, ...]
    """Live features by share of |mean DFA|, largest first."""
    sources: tuple[Span, ...]
    """Percent of the head's |DFA| by distance back to the source, in the strongest examples of the features above."""
    n_examples: int
    """Examples that `sources` is taken from."""
    looks_back: tuple[Span, ...]
    """Features that it leads by data, by their own mean distance back to the source (all heads together)."""
    studied: StudiedHead | None
    """Null where no study looked at it."""


@dataclass(frozen=True)
class ModelHead:
    """A head of a model, as the newest published SAE of its layer sees it."""

    layer: int
    sae: str
    """Name of the SAE."""
    line: HeadLine
    """What its features say of the head."""


@dataclass(frozen=True)
class ModelHeads:
    """Every head of a model."""

    model: str
    n_layers: int | None
    n_heads: int | None
    saes: tuple[SaeRef, ...]
    """The SAEs that speak for their layers."""
    heads: tuple[ModelHead, ...]
    """By layer, then by head."""


def head_summaries(session: Session, door: Door) -> tuple[HeadLine, ...]:
    """One line per head, in order; none before a harvest is published, nor of harvests made before heads were summarised."""
    harvest = door.sae.harvest
    if harvest is None:
        return ()
    return kept(session, harvest, "heads", lambda: tuple(_line(row) for row in _summaries(session, [harvest.id])))


def head_page(session: Session, door: Door, head: int) -> HeadPage:
    """The page of one head: six queries after the door's one."""
    check_head(door, head)
    if door.sae.harvest is None:
        raise NotFound(
            f"{door.sae.name} has no published harvest yet; its heads are described when one is complete.", field="sae"
        )
    lines = head_summaries(session, door)
    by_weights, by_data = (
        feature_table(session, door, FeatureQuery(head=head, sort=sort, dead=False, limit=TOP)).rows
        for sort in ("-head_share", "-dfa_share")
    )
    shown = {row.index for row in (*by_weights, *by_data)}
    sources, n_examples = _sources(session, door.sae.harvest.id, head, shown)
    return HeadPage(
        sae=door.sae,
        head=head,
        n_layer_heads=door.sae.n_heads,
        line=next((line for line in lines if line.head == head), None),
        layer=lines,
        by_weights=by_weights,
        by_data=by_data,
        sources=sources,
        n_examples=n_examples,
        looks_back=_looks_back(session, door.sae.harvest.id, head),
        studied=_studied(session, door.sae.model, door.sae.layer, head),
    )


def model_heads(session: Session, name: str) -> ModelHeads:
    """Every head of the model's layers that have a published harvest: three queries."""
    model = session.scalar(sa.select(Model).where(Model.name == name))
    if model is None:
        known = ", ".join(session.scalars(sa.select(Model.name).order_by(Model.name).limit(6)))
        raise NotFound(f"There is no model called '{name}'. There are: {known or 'none yet'}.", field="model")
    saes = newest_of_each_layer(session, model)
    of_harvest = {sae.harvest.id: sae for sae in saes if sae.harvest}
    heads = [
        ModelHead((sae := of_harvest[row.harvest_id]).layer, sae.name, _line(row)) for row in _summaries(session, of_harvest)
    ]
    heads.sort(key=lambda one: (one.layer, one.line.head))
    return ModelHeads(model.name, model.n_layers, model.n_heads, saes, tuple(heads))


def check_head(door: Door, head: int | None) -> None:
    """UsageError unless the SAE reads that head."""
    if head is not None and head >= door.sae.n_heads:
        raise UsageError(f"Head {head} does not exist: {door.sae.name} has heads 0 to {door.sae.n_heads - 1}.", field="head")


def summaries_of(session: Session, harvest_ids: Iterable[int]) -> dict[tuple[int, int], HeadLine]:
    """Lines by harvest and head."""
    return {(row.harvest_id, row.head): _line(row) for row in _summaries(session, harvest_ids)}


def _summaries(session: Session, harvest_ids: Iterable[int]) -> Sequence[HeadSummary]:
    wanted = HeadSummary.harvest_id.in_(list(harvest_ids))
    return session.scalars(sa.select(HeadSummary).where(wanted).order_by(HeadSummary.harvest_id, HeadSummary.head)).all()


def _line(row: HeadSummary) -> HeadLine:
    return HeadLine(
        head=row.head,
        n_led=row.n_led,
        n_led_norm=row.n_led_norm,
        families=tuple(Count(name, n) for name, n in sorted(row.families.items(), key=lambda item: (-item[1], item[0]))),
        diversity=row.diversity,
        polysemantic=row.polysemantic,
        top=tuple(HeadFeature(int(idx), share) for idx, share in row.detail.get("top", [])),
        detail=row.detail,
    )


def _sources(session: Session, harvest_id: int, head: int, indices: Iterable[int]) -> tuple[tuple[Span, ...], int]:
    """Where the head's |DFA| comes from by distance: of the kept entries alone, since what was left out has no place. Each
    example counts alike, however strong it is."""
    examples = session.execute(
        sa.select(Example.dest, Example.start, Example.dfa, sa.literal(b"", sa.LargeBinary).label("acts"))
        .join(Feature, Feature.id == Example.feature_id)
        .where(Feature.harvest_id == harvest_id, Feature.idx.in_(sorted(indices)), Example.band == 0)
    ).all()
    if not examples:
        return (), 0
    found = read_examples(examples)  # all at once: one by one they took most of the page's time
    whose = np.repeat(np.arange(len(examples)), np.diff(found.end, prepend=0))
    mine = found.head == head
    whose, size = whose[mine], np.abs(found.value[mine])
    back = np.array([example.dest for example in examples])[whose] - found.src[mine]
    given = np.bincount(whose, size, len(examples))
    counted = int((given > 0).sum())
    total = np.histogram(back, bins=DISTANCES, weights=size / np.where(given > 0, given, 1)[whose])[0]
    return _bins([100 * share / counted for share in total.tolist()] if counted else []), counted


def _looks_back(session: Session, harvest_id: int, head: int) -> tuple[Span, ...]:
    led = sa.select(Feature.distance).where(
        Feature.harvest_id == harvest_id, Feature.top_head_dfa == head, Feature.distance.is_not(None)
    )
    counts = np.histogram([back for back in session.scalars(led) if back is not None], bins=DISTANCES)[0].tolist()
    return _bins(counts if sum(counts) else [])


def _bins(values: Sequence[float]) -> tuple[Span, ...]:
    """Bars of distance up to the last that is not empty."""
    last = max((i for i, value in enumerate(values) if value), default=-1)
    return tuple(Span(DISTANCES[i], DISTANCES[i + 1], value) for i, value in enumerate(values[: last + 1]))


def _studied(session: Session, model: str, layer: int, head: int) -> StudiedHead | None:
    study = session.scalar(
        sa.select(Study)
        .join(Model, Model.id == Study.model_id)
        .where(Model.name == model, Study.kind == "induction")
        .order_by(Study.created_at.desc(), Study.id.desc())
        .limit(1)
    )
    heads = study.result.get("heads", []) if study else []
    found = next((one for one in heads if (one["layer"], one["head"]) == (layer, head)), None)
    if study is None or found is None:
        return None
    return StudiedHead(study.id, found["role"], found["best"], found.get("previous"), found.get("duplicate"))
