"""What the engine is asked of circuits, and what it answers.

A node's id says what it is: `f17.755@8` feature 755 of layer 17 at position 8, `e17@8` the error there, `t10.33@8` and `u10@8` a
feature of layer 10's transcoder and what that leaves of its MLP, `a3@8` and `m3@8` an attention without an SAE and an MLP without
a transcoder, `x@8` the embedding, `p@8` its position, `b:SAE-bias` a bias, `l504@9` a logit, `l504-31@9` a difference.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_core.errors import Unfitting

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, hide_input_in_errors=True)
_FROZEN = ConfigDict(frozen=True, use_attribute_docstrings=True)

Kind = Literal["logit", "feature", "error", "attention", "MLP feature", "MLP error", "MLP", "embedding", "position", "bias"]
FEATURES: tuple[Kind, ...] = ("feature", "MLP feature")
"""Kinds that can be taken apart, beside a logit."""
LETTERS: dict[Kind, str] = {"error": "e", "attention": "a", "MLP error": "u", "MLP": "m", "embedding": "x", "position": "p"}


class FeatureRoot(BaseModel):
    """Begin at a feature's pre-activation."""

    model_config = _STRICT

    kind: Literal["feature"] = "feature"
    """Tells it from a logit."""
    sae: str
    """Name of the SAE, one of those asked for."""
    index: int
    """Index of the feature in its SAE, counted from 0."""
    dest: int
    """The token's position; the row start is position 0."""


class LogitRoot(BaseModel):
    """Begin at the logit of a token, less that of another, or less the mean over the vocabulary."""

    model_config = _STRICT

    kind: Literal["logit"]
    """Tells it from a feature."""
    dest: Annotated[int | None, Field(ge=0)] = None
    """The position after which the token would come; null is the last."""
    token: Annotated[int | None, Field(ge=0)] = None
    """Id of the token; without it and `text`, the likeliest."""
    text: Annotated[str | None, Field(min_length=1, max_length=200)] = None
    """The same as a text, whose first token is taken."""
    against: Annotated[int | None, Field(ge=0)] = None
    """Id of the other token."""
    against_text: Annotated[str | None, Field(min_length=1, max_length=200)] = None
    """The same as a text."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.token is not None and self.text is not None) or (self.against is not None and self.against_text is not None):
            raise Unfitting("give a token by its id or by its text, not both", field="root")
        return self


class ScoreAt(BaseModel):
    """An attention score: why a head looked from one position to another."""

    model_config = _STRICT

    layer: Annotated[int, Field(ge=0)]
    """Layer of the model, counted from 0."""
    head: Annotated[int | None, Field(ge=0)] = None
    """The head, counted from 0; null takes the one that looked there most."""
    dest: Annotated[int, Field(ge=0)]
    """From here."""
    src: Annotated[int, Field(ge=0)]
    """To here."""
    against_mean: bool = False
    """Take the score's lead over its mean over all sources, since what every source has wins nothing."""
    most: Annotated[int, Field(ge=1, le=200)] = 20
    """How many pairs, and parts of each side, are told."""


class CircuitQuestion(BaseModel):
    """What made a feature, or a logit, from the features before it?"""

    model_config = _STRICT

    saes: Annotated[list[str], Field(min_length=1, max_length=100)]
    """Names of the SAEs, all of one model, at most one of each layer."""
    text: Annotated[str | None, Field(max_length=100_000)] = None
    """Text to run; the row start is put before it."""
    tokens: Annotated[list[int] | None, Field(max_length=100_000)] = None
    """Token ids of a whole row, row start included, in place of text."""
    root: Annotated[FeatureRoot | LogitRoot, Field(discriminator="kind")]
    """Where to begin."""
    share: Annotated[float, Field(ge=0.0005, le=1)] = 0.02
    """Features are followed whose effect is at least this share of the root's value; parts are listed from a tenth of it."""
    most: Annotated[int, Field(ge=1, le=200)] = 40
    """How many nodes are taken apart."""
    depth: Annotated[int | None, Field(ge=0, le=100)] = None
    """None is taken apart that is more than so many edges from the root; null follows to the first layer."""
    widest: Annotated[int, Field(ge=1, le=100)] = 25
    """A node has at most so many edges from features, and as many from other parts; the rest is summed."""
    transcoders: bool = True
    """Go through MLPs, where the model has transcoders of them; false leaves every MLP whole."""
    score: ScoreAt | None = None
    """A score to take apart beside it."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.text is None) == (self.tokens is None):
            raise Unfitting("give either text or tokens", field="text")
        if len(set(self.saes)) < len(self.saes):
            raise Unfitting("name each SAE once", field="saes")
        if isinstance(self.root, FeatureRoot) and self.root.sae not in self.saes:
            raise Unfitting("the feature's SAE must be one of those asked for", field="root")
        return self


class CircuitPlace(BaseModel):
    """What a node is."""

    model_config = _FROZEN

    id: str
    """As the module's text says; the same wherever it comes up in a text."""
    kind: Kind
    """`attention` is one without an SAE, `MLP` one without a transcoder; `error` is what an SAE left out, `MLP error` what a
    transcoder left of its MLP."""
    layer: int
    """Layer of the model, counted from 0; -1 where there is none, the number of layers for a logit."""
    position: int
    """Position in the text; -1 of biases, which are the same everywhere."""
    index: int
    """Of a feature its index, of a logit the token's id; else -1."""
    name: str
    """Of a bias which it is; of a logit difference the other token's id; else empty."""


class CircuitNode(CircuitPlace):
    """A quantity of the graph."""

    value: float | None
    """Computed on its own: a feature's pre-activation, a logit; null of what is not taken apart."""
    activation: float | None
    """Of a feature, an SAE's or a transcoder's."""
    effect: float
    """Its part of the root's value, along all ways that were followed; the root's own is that value."""
    share: float
    """The effect over the root's value."""
    followed: bool
    """Whether it is taken apart: its edges and `rest` then sum to `value`."""
    rest: float
    """Sum of its parts that have no edge."""
    n_rest: int
    """How many they are."""
    gap: float
    """|sum of all parts - value| / sum of |parts|, before anything is left out."""


class CircuitEdge(BaseModel):
    """What one node gave to another."""

    model_config = _FROZEN

    source: str
    """Id of the node that gave."""
    target: str
    """Id of the node that read."""
    value: float
    """In units of the target's value; negative where it held it down."""
    share: float
    """Over the target's value."""
    effect: float
    """By this edge alone: its part of the root's value."""
    heads: list[float]
    """By head of the target's layer, which sum to `value`; empty into a logit or an MLP, and of biases."""


class CircuitSae(BaseModel):
    """An SAE that the circuit goes through."""

    model_config = _FROZEN

    sae: str
    """Name of the SAE."""
    layer: int
    """Layer that it reads."""


class CircuitTranscoder(BaseModel):
    """A transcoder that the circuit goes through."""

    model_config = _FROZEN

    layer: int
    """Layer of its MLP."""
    n_features: int
    """How many features it has."""


class LikelyToken(BaseModel):
    """A token that may come next."""

    model_config = _FROZEN

    id: int
    """Id in the model's vocabulary."""
    text: str
    """The token as shown."""
    probability: float
    """The model's own."""


class ScorePart(CircuitPlace):
    """What one part of the query, or of the key, gave with all of the other side."""

    value: float
    """In units of the score."""


class ScorePair(BaseModel):
    """What a part of the query gave with a part of the key."""

    model_config = _FROZEN

    query: CircuitPlace
    """What of the destination's stream."""
    key: CircuitPlace
    """What of the source's stream."""
    value: float
    """In units of the score."""


class LiveScore(BaseModel):
    """An attention score, before soft cap and softmax, the norms' scales frozen: pairs and `rest` sum to `value`."""

    model_config = _FROZEN

    layer: int
    """Layer of the model, counted from 0."""
    head: int
    """The head, counted from 0."""
    dest: int
    """From here."""
    src: int
    """To here."""
    against_mean: bool
    """Whether `value` is the score's lead over its mean."""
    value: float
    """From the model's own queries and keys: the score, or its lead."""
    scores: list[float]
    """By head, from `dest` to `src`."""
    means: list[float]
    """By head, the mean over all sources that the mask lets through."""
    patterns: list[float]
    """By head, what the softmax made of it."""
    cap: float | None
    """The model's soft cap; null where it has none."""
    queries: list[ScorePart]
    """The largest parts of the query, by size."""
    query_rest: float
    """Sum of its other parts."""
    keys: list[ScorePart]
    """The largest parts of the key, by size."""
    key_rest: float
    """Sum of its other parts."""
    pairs: list[ScorePair]
    """The largest, by size."""
    rest: float
    """Sum of all other pairs."""
    n_rest: int
    """How many they are."""
    gap: float
    """|sum of all pairs - value| / sum of |pairs|."""


class LiveCircuit(BaseModel):
    """The answer: a graph whose every node's edges and remainder sum to a value that was computed on its own. Positions count
    from the row start, which is position 0."""

    model_config = _FROZEN

    model: str
    """Name of the model."""
    n_layers: int
    """Its layers."""
    tokens: list[int]
    """Ids in the model's vocabulary, one per position."""
    texts: list[str]
    """Tokens as shown, one per position."""
    saes: list[CircuitSae]
    """Those that were asked for, by layer."""
    transcoders: list[CircuitTranscoder]
    """The model's, of layers below the root, by layer; empty where it has none or they were not asked for."""
    root: str
    """Id of the node that it begins at."""
    likely: list[LikelyToken]
    """Of a logit: the tokens of the root first, then the likeliest; empty of a feature."""
    nodes: list[CircuitNode]
    """The root first, then from the last layer down, larger effects first."""
    edges: list[CircuitEdge]
    """In the order of their targets, the largest first."""
    gap: float
    """The largest of the nodes'."""
    score: LiveScore | None
    """The score that was asked about; null where none was."""


def place_id(kind: Kind, layer: int, position: int, index: int, name: str) -> str:
    """The id of a node."""
    if kind in FEATURES:
        return f"{'f' if kind == 'feature' else 't'}{layer}.{index if index >= 0 else 'others'}@{position}"
    if kind == "logit":
        return f"l{index}{'-' + name if name else ''}@{position}"
    if kind == "bias":
        return f"b:{name.replace(' ', '-')}"
    return f"{LETTERS[kind]}{layer if layer >= 0 else ''}@{position}"
