"""A feature as scripts read it: its numbers, and beside them the parts that were asked for."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from server.api.common import listed
from server.store.features import (
    Band,
    DfaColumns,
    DfaJson,
    FamilyVerdict,
    FeatureExample,
    FeatureNumbers,
    FeaturePage,
    HeadShare,
    Neighbour,
    Partner,
    PositionBucket,
    TokenWeight,
)

Part = Literal["heads", "logits", "families", "activations", "others", "examples", "dfa"]
PARTS: tuple[Part, ...] = get_args(Part)
OF_EXAMPLES = ("examples", "dfa")


class Include(BaseModel):
    """Which parts of a feature are wanted."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    include: str | None = Field(None, pattern=listed(PARTS), examples=["examples,dfa,logits"])
    """Parts, with commas between: `heads` (shares by weights and by data), `logits` (promoted and suppressed tokens and the
    histogram), `families` (verdicts with their evidence), `activations` (histogram, bands, positions), `others` (near and
    co-active features), `examples`, `dfa` (examples with what each head and source token gave). None: the numbers alone."""
    all_examples: bool = False
    """Every example that was kept, not the first ones only."""

    @property
    def parts(self) -> frozenset[str]:
        """What is asked for."""
        return frozenset(self.include.split(",")) if self.include else frozenset()


@dataclass(frozen=True)
class HeadShares:
    """Which heads a feature reads."""

    shares: tuple[HeadShare, ...]
    """One for each head, in order."""
    agreement: float | None
    """Of the heads' two shares, 0 to 1: 1 - sum |norm share - DFA share| / 2. None when dead."""


@dataclass(frozen=True)
class Logits:
    """What a feature does to the next token, through W_O and the unembedding."""

    promoted: tuple[TokenWeight, ...]
    suppressed: tuple[TokenWeight, ...]
    """Tokens that it makes less likely most, the strongest first."""
    edges: tuple[float, ...]
    """Edges of the histogram of how much it promotes each token of the vocabulary: one more than `counts`."""
    counts: tuple[int, ...]
    """Tokens of the vocabulary between two edges; empty in harvests before these were kept."""


@dataclass(frozen=True)
class Families:
    """What a feature seems to do."""

    verdicts: tuple[FamilyVerdict, ...]
    """All that hold, clearest first."""
    evidence: dict[str, Any]
    """What each detector measured, by its name; the page of attribution in the documentation says how."""
    sample: dict[str, Any]
    """Of the kept examples: where DFA comes from by distance, and how it is spread."""


@dataclass(frozen=True)
class Activations:
    """When and how strongly a feature fires."""

    edges: tuple[float, ...]
    """Edges of the histogram of activations, equal in log: one more than `counts`."""
    counts: tuple[int, ...]
    """Firings between two edges."""
    bands: tuple[Band, ...]
    """Ranges of activation that examples are drawn from, the strongest first."""
    positions: tuple[PositionBucket, ...]
    """Where in the row it fires."""


@dataclass(frozen=True)
class Others:
    """Features beside it."""

    neighbours: tuple[Neighbour, ...]
    """Those whose decoder directions are nearest, nearest first."""
    coactive: tuple[Partner, ...]
    """Those that fire on the same tokens, most correlated first."""
    coactive_tokens: int
    """Tokens in the sample that `coactive` counts on."""


class Entry(msgspec.Struct, gc=False):
    """What one (source, head) pair gave to the feature at the example's destination: a feature has some hundreds of them, and
    nothing is made, or written as an object of JSON, as quickly."""

    src: int
    head: int
    value: float

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(DfaJson)


@dataclass(frozen=True)
class ExampleDfa:
    """What made a feature fire. sum + bias of the example = its preact."""

    entries: tuple[Entry, ...]
    """The largest, by (source, head)."""
    dropped: tuple[float, ...]
    """Per head, the sum of the entries that are not listed."""
    before: tuple[float, ...]
    """Per head, the sum over sources before the first token of `texts`."""
    sum: float
    """Of everything above."""
    abs: float
    """Sum of |DFA| over all heads and sources."""


@dataclass(frozen=True)
class ExampleParts:
    """A row where the feature fired, at one destination. Positions count from the row's start."""

    band: int
    """0: the strongest examples; 1 and up: drawn from the bands of activation, strongest band first."""
    rank: int
    row: int
    start: int
    """Position of the first token in `texts`."""
    dest: int
    texts: tuple[str, ...]
    acts: dict[int, float]
    """Position -> activation, where it is not zero."""
    act: float
    """Activation at the destination."""
    preact: float
    """The pre-activation, computed on its own from the hooked z."""
    bias: float
    """The SAE's own: c of its affine map. With all DFA it gives `preact`."""
    gap: float
    """|sum of DFA + bias - preact| / (sum of |DFA| + |bias|), from the numbers as stored."""
    attributed: Literal["heads", "heads summed", "none"]
    """How much is known of its DFA. Summed, as imported ones may be: `dfa` has one head that stands for all, and `bias` is what
    is left of the activation. None: the numbers from `bias` on say nothing, nor does `preact`."""
    dfa: ExampleDfa | None
    """Null unless asked for."""


@dataclass(frozen=True)
class FeatureParts(FeatureNumbers):
    """A feature; parts that were not asked for are null."""

    sae: str
    """Name of the SAE."""
    harvest: int
    """Id of the harvest that the numbers come from."""
    kept: int | None
    """Examples that there are; null unless examples were asked for."""
    heads: HeadShares | None
    """Null unless asked for."""
    logits: Logits | None
    """Null unless asked for."""
    families: Families | None
    """Null unless asked for."""
    activations: Activations | None
    """Null unless asked for."""
    others: Others | None
    """Null unless asked for."""
    examples: tuple[ExampleParts, ...] | None
    """The strongest first, then band by band; null unless asked for."""


def of_page(page: FeaturePage, asked: frozenset[str]) -> FeatureParts:
    """The parts of a feature's page that are `asked`."""
    dfa = "dfa" in asked
    shown = dfa or "examples" in asked
    return FeatureParts(
        sae=page.sae.name,
        index=page.index,
        harvest=page.sae.harvest.id if page.sae.harvest else 0,
        label=page.label,
        n_fired=page.n_fired,
        density=page.density,
        max_act=page.max_act,
        mean_act=page.mean_act,
        distance=page.distance,
        family=page.family,
        family_score=page.family_score,
        verdict=page.verdict,
        kept=(len(page.examples) if page.kept is None else page.kept) if shown else None,
        heads=HeadShares(page.heads, page.agreement) if "heads" in asked else None,
        logits=Logits(page.promoted, page.suppressed, page.logit_edges, page.logit_counts) if "logits" in asked else None,
        families=Families(page.families, page.evidence, page.sample) if "families" in asked else None,
        activations=Activations(page.histogram_edges, page.histogram_counts, page.bands, page.positions)
        if "activations" in asked
        else None,
        others=Others(page.neighbours, page.coactive, page.coactive_tokens) if "others" in asked else None,
        examples=tuple(_example(one, dfa) for one in page.examples) if shown else None,
    )


def _example(one: FeatureExample, dfa: bool) -> ExampleParts:
    return ExampleParts(
        band=one.band,
        rank=one.rank,
        row=one.row,
        start=one.start,
        dest=one.dest,
        texts=one.texts,
        acts=one.acts,
        act=one.act,
        preact=one.preact,
        bias=one.bias,
        gap=one.gap,
        attributed=one.attributed,
        dfa=ExampleDfa(_entries(one), one.dropped, one.before, one.dfa_sum, one.abs_dfa) if dfa else None,
    )


def _entries(one: FeatureExample) -> tuple[Entry, ...]:
    of = one.dfa if isinstance(one.dfa, DfaColumns) else DfaColumns.of(one.dfa)
    return tuple(map(Entry, of.src.tolist(), of.head.tolist(), of.value.tolist()))


to_json = msgspec.json.Encoder().encode
"""A feature, or features, as JSON: what pydantic makes of them (tests/web/test_export.py), in a third of its time."""
