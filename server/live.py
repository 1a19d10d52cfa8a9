"""The web's client of the engine: typed questions and answers, and a sentence when it is away. No torch."""

from typing import Annotated, Literal, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_core import errors
from sae_core.errors import EngineAway, HeadscopeError, Unfitting
from server import logs, telemetry
from server.circuits.asked import CircuitQuestion, LiveCircuit
from server.settings import Settings

SECRET_HEADER = "X-Headscope-Secret"  # pragma: allowlist secret  # noqa: S105 - the name of a header
LOAD_SECONDS = 120.0  # the first question loads a model


class TextQuestion(BaseModel):
    """A text, and the SAE that reads it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # typed text
    )

    sae: str
    """Name of the SAE."""
    text: Annotated[str | None, Field(max_length=100_000)] = None
    """Text to run; the row start is put before it."""
    tokens: Annotated[list[int] | None, Field(max_length=100_000)] = None
    """Token ids of a whole row, row start included, in place of text."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.text is None) == (self.tokens is None):
            raise Unfitting("give either text or tokens", field="text")
        return self


class LiveQuestion(TextQuestion):
    """What does one feature do on this text, and which heads and source tokens make it fire?"""

    index: int
    """The feature."""
    dest: int | None = None
    """Destination position; None takes the position with the largest pre-activation."""
    split_bias: bool = False
    """Take what the values' bias gave out of the sources: `dfa` is then of the values less their bias, and
    `LiveAttribution.value_bias` says what the bias gave through each head."""


class ComponentsQuestion(LiveQuestion):
    """Which earlier parts of the model put into the sources what the heads moved?"""

    head: int | None = None
    """Of this head alone; None sums over heads."""


class FiringQuestion(TextQuestion):
    """Which features fire on this text, and how strongly?"""

    features: Annotated[list[int], Field(max_length=100)] = []
    """Features whose activations at every position are wanted."""
    top: Annotated[int, Field(ge=0, le=100)] = 10
    """How many of the strongest features are wanted, of each position and of the whole text."""


class SourcesQuestion(TextQuestion):
    """What did each source token give to some features, each at a destination of its own?"""

    features: Annotated[list[int], Field(min_length=1, max_length=100)]
    dests: list[int]
    """Of each feature."""

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.features) != len(self.dests):
            raise Unfitting("give a destination for each feature", field="dests")
        return self


Ticket = Annotated[str, Field(min_length=16, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
"""A random word that names a question in the engine's line; whoever has it may look for the answer or cancel it."""


class FeatureAt(BaseModel):
    """A feature of a prompt's own, at one of its tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    sae: str
    """Name of the SAE."""
    index: int
    """Index of the feature in its SAE, counted from 0."""
    dest: int
    """The token's position; the row start is position 0."""
    next: Annotated[int | None, Field(ge=0)] = None
    """Id of the next token whose logit is asked about; null takes the one that follows in the text, else the most likely."""
    next_text: Annotated[str | None, Field(min_length=1, max_length=200)] = None
    """The same as a text, whose first token is taken."""


class PromptQuestion(BaseModel):
    """What fires on a text, in several SAEs of one model at once?"""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    saes: Annotated[list[str], Field(min_length=1, max_length=100)]
    """Names of the SAEs, all of one model."""
    text: Annotated[str | None, Field(max_length=100_000)] = None
    """Text to run; the row start is put before it."""
    tokens: Annotated[list[int] | None, Field(max_length=100_000)] = None
    """Token ids of a whole row, row start included, in place of text."""
    against: Annotated[str | None, Field(max_length=100_000)] = None
    """A second text, to be compared with the first."""
    top: Annotated[int, Field(ge=1, le=1000)] = 8
    """How many of the strongest features are wanted of each position and SAE."""
    at: Annotated[int | None, Field(ge=0)] = None
    """A position of which every feature is wanted."""
    against_at: Annotated[int | None, Field(ge=0)] = None
    """The same of the second text."""
    feature: FeatureAt | None = None
    """A feature to take apart by head and source, and whose effect on the next token is wanted."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.text is None) == (self.tokens is None):
            raise ValueError("give either text or tokens")
        if len(set(self.saes)) < len(self.saes):
            raise ValueError("name each SAE once")
        if self.feature is not None and self.feature.sae not in self.saes:
            raise ValueError("the feature's SAE must be one of those asked for")
        return self


class FeatureChanged(BaseModel):
    """What is done to a feature while the model reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    sae: str
    """Name of the SAE."""
    index: int
    """Index of the feature in its SAE, counted from 0."""
    how: Literal["ablate", "mean", "resample", "set", "scale", "steer"] = "steer"
    """Its activation becomes 0 (`ablate`), its mean over all tokens of its harvest (`mean`), what it is at the same position of
    the text `other` (`resample`), `value` (`set`), `value` times itself (`scale`), or itself and `value` (`steer`), which adds
    its decoder direction so many times whether it fires or not."""
    value: Annotated[float, Field(ge=-1e4, le=1e4)] = 0.0
    """As `how` reads it."""
    at: Annotated[list[int], Field(max_length=10_000)] | None = None
    """Positions; null is every one that has features, those of new tokens too (but not of `resample`)."""


class LayerAblated(BaseModel):
    """What is put in the place of a layer's z, features or not."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    layer: Annotated[int, Field(ge=0)]
    """The layer."""
    how: Literal["zero", "mean", "resample"] = "zero"
    """Zeros, the mean of z over harvested text, or z at the same position of the text `other`."""
    heads: Annotated[list[int], Field(min_length=1, max_length=1000)] | None = None
    """Of these heads alone; null is all."""
    at: Annotated[list[int], Field(max_length=10_000)] | None = None
    """Positions; null is every one but row starts, those of new tokens too (but not of `resample`)."""


class SteerQuestion(BaseModel):
    """What becomes of a text when features are changed?"""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, hide_input_in_errors=True)

    features: Annotated[list[FeatureChanged], Field(max_length=32)] = []
    """What is changed, of SAEs of one model, at most one SAE of each layer."""
    ablations: Annotated[list[LayerAblated], Field(max_length=32)] = []
    """Layers whose z is taken out, of the model of the SAEs named; where it is the layer of a changed feature, z is taken out
    first."""
    text: Annotated[str | None, Field(max_length=100_000)] = None
    """Text to run; the row start is put before it."""
    tokens: Annotated[list[int] | None, Field(max_length=100_000)] = None
    """Token ids of a whole row, row start included, in place of text."""
    other: Annotated[str | None, Field(max_length=100_000)] = None
    """The text that `resample` takes from; it must have as many tokens as are resampled, or more."""
    look: Annotated[int | None, Field(ge=0)] = None
    """The position whose next token is told; null is the last."""
    next_texts: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=8)] = []
    """Next tokens whose logits are told whatever they are, as texts, of each of which the first token is taken."""
    keep_error: bool = True
    """Keep what the SAE does not reconstruct; without it, z where something is changed is the reconstruction."""
    watch: Annotated[list[str], Field(max_length=100)] = []
    """Names of more SAEs: what changes in those after the first changed layer is told."""
    most: Annotated[int, Field(ge=0, le=1000)] = 20
    """How many changed features are told."""
    new_tokens: Annotated[int, Field(ge=0, le=100)] = 0
    """How far the model goes on with the text, as it is and with the features changed."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Of the tokens that it draws; 0 takes the most likely."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Of the draws, which are the same for both texts."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.text is None) == (self.tokens is None):
            raise Unfitting("give either text or tokens", field="text")
        if not self.features and not self.ablations:
            raise Unfitting("give something to change", field="features")
        if not self.features and not self.watch:
            raise Unfitting("name an SAE of the model", field="watch")
        if self.other is None and any(one.how == "resample" for one in self.changes):
            raise Unfitting("give the text to resample from", field="other")
        return self

    @property
    def changes(self) -> list[FeatureChanged | LayerAblated]:
        """All that is changed."""
        return [*self.features, *self.ablations]


class LiveSources(BaseModel):
    """DFA of some features on one text, heads summed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    sae: str
    given: list[list[float]]
    """[as asked][source]; 0 after the destination."""


class LiveCodes(BaseModel):
    """All that fires on a text. Positions count from the row start, which is position 0."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    sae: str
    tokens: list[int]
    texts: list[str]
    """Tokens as shown, one per position."""
    excluded: list[bool]
    """Positions that are no destinations: the row start and attention sinks."""
    positions: list[int]
    """One for each firing, ascending."""
    features: list[int]
    """Of each firing, ascending within a position."""
    activations: list[float]
    """Of each firing, above 0."""


class Firing(BaseModel):
    """A feature that fires at a position."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    index: int
    """Index of the feature in its SAE, counted from 0."""
    position: int
    """Where it fires."""
    activation: float
    """How strongly."""


class FeatureActivations(BaseModel):
    """A feature's activations."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    index: int
    """Index of the feature in its SAE, counted from 0."""
    activations: list[float]
    """By position; 0 at excluded ones."""


class LiveFirings(BaseModel):
    """What fires on a text. Positions count from the row start, which is position 0."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    sae: str
    """Name of the SAE."""
    tokens: list[int]
    """Ids in the model's vocabulary, one per position."""
    texts: list[str]
    """Tokens as shown, one per position."""
    excluded: list[bool]
    """Positions that are no destinations: the row start and attention sinks."""
    strongest: list[Firing]
    """The features with the largest activations anywhere, each where it is largest."""
    by_position: list[list[Firing]]
    """The strongest features at each position, strongest first; empty at excluded ones."""
    features: list[FeatureActivations]
    """Those that were asked for."""


class LiveAttribution(BaseModel):
    """The answer. Positions count from the row start, which is position 0."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    sae: str
    """Name of the SAE."""
    index: int
    """Index of the feature in its SAE, counted from 0."""
    tokens: list[int]
    """Ids in the model's vocabulary, one per position."""
    texts: list[str]
    """Tokens as shown, one per position."""
    activations: list[float]
    """By position; 0 at excluded ones."""
    preacts: list[float]
    """w . z + c, by position."""
    excluded: list[bool]
    """Positions that are no destinations: the row start and attention sinks."""
    dest: int
    """The destination: the position asked for, else where the feature is strongest."""
    dfa: list[list[float]]
    """[head][source]: what each gave at `dest`; with `value_bias` and `bias` they sum to `preacts[dest]`."""
    value_bias: list[float] | None = None
    """[head]: what the values' bias gave, whatever the sources were; None where it was not asked for, and all is in `dfa`."""
    bias: float
    """The SAE's own: c of its affine map."""
    gap: float
    """|sum of DFA and biases - preact| / (sum of |DFA| + |biases|)."""


class PromptSae(BaseModel):
    """What fires in one SAE on a text."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    sae: str
    """Name of the SAE."""
    layer: int
    """Layer that it reads."""
    excluded: list[bool]
    """Positions that are no destinations: the row start and attention sinks."""
    counts: list[int]
    """By position: how many features fire."""
    by_position: list[list[Firing]]
    """By position: the strongest features, strongest first; every one at the position asked for."""


class PromptText(BaseModel):
    """What fires on a text. Positions count from the row start, which is position 0."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    tokens: list[int]
    """Ids in the model's vocabulary, one per position."""
    texts: list[str]
    """Tokens as shown, one per position."""
    saes: list[PromptSae]
    """In the order asked for."""


class NextToken(BaseModel):
    """A token that may come next, and what the feature writes to it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: int
    """Id in the model's vocabulary."""
    text: str
    """The token as shown."""
    probability: float
    """The model's own."""
    written: float
    """What the feature writes straight to its logit, above what it writes to the mean token."""


class LiveWritten(BaseModel):
    """What one feature writes straight to the logits of the next token, the final norm frozen: activation x decoder direction
    through W_O, the norms with the scales that they have here, and the unembedding, less the mean over the vocabulary."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    activation: float
    """The feature's own at the token."""
    chosen: NextToken
    """The next token that was asked about."""
    rank: int
    """How many tokens of the vocabulary are raised more than it."""
    likely: list[NextToken]
    """The tokens that the model finds most likely, most likely first."""
    raised: list[NextToken]
    """The tokens that the feature raises most."""
    lowered: list[NextToken]
    """The tokens that it lowers most."""


class WrittenText(BaseModel):
    """How the model went on."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    tokens: list[int]
    """Ids of the new tokens."""
    text: str
    """Their text."""


class NextChange(BaseModel):
    """A token that may come next, before and after the change."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: int
    """Its number in the vocabulary."""
    text: str
    """The token as shown."""
    probability: float
    """The model's own."""
    changed: float
    """With the features changed."""
    logit: float
    """As the model is."""
    changed_logit: float
    """With the features changed."""


class ChangedFeature(BaseModel):
    """A feature that was changed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    sae: str
    """Name of the SAE."""
    index: int
    """Index of the feature in its SAE, counted from 0."""
    activations: list[float]
    """By position, as the model is; 0 where the SAE has no features."""


class ActivationChange(BaseModel):
    """A feature of a later layer that the change reached."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    sae: str
    """Name of the SAE."""
    index: int
    """Index of the feature in its SAE, counted from 0."""
    position: int
    """Where."""
    activation: float
    """As the model is."""
    changed: float
    """With the features changed."""


class LiveSteered(BaseModel):
    """A text as the model reads it, and with features changed. Positions count from the row start, which is position 0."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    model: str
    """Name of the model."""
    tokens: list[int]
    """Ids in the model's vocabulary, one per position."""
    texts: list[str]
    """Tokens as shown, one per position."""
    losses: list[float]
    """Cross-entropy in nats of the token after each position, but for the last, as the model is."""
    changed_losses: list[float]
    """The same with the features changed."""
    kl: list[float]
    """By position: KL divergence in nats of the changed prediction from the model's own."""
    look: int
    """The position whose next token is told."""
    likely: list[NextChange]
    """The likeliest tokens after it, of either prediction, those first whose probability changes most."""
    asked: list[NextChange]
    """Those that were asked for, in that order."""
    features: list[ChangedFeature]
    """What was changed, in the order given."""
    reached: list[ActivationChange]
    """Features of SAEs after the first changed layer, largest change first."""
    n_reached: int
    """How many there are, those that are not told included."""
    plain: WrittenText
    """How the model goes on."""
    changed: WrittenText
    """How it goes on with the features changed."""


class LivePrompt(BaseModel):
    """The answer to a prompt."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    model: str
    """Name of the model."""
    prompt: PromptText
    """The text."""
    against: PromptText | None
    """The second text; null where there was none."""
    attribution: LiveAttribution | None
    """The feature that was asked about, taken apart; null where none was."""
    written: LiveWritten | None
    """What it writes to the next token's logits."""


class InLine(BaseModel):
    """Where a question is, or its answer."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    ticket: str
    """Names the question."""
    place: int | None
    """How many are before it; 0 while it is being answered; null once it is."""
    answer: LivePrompt | None
    """Of a prompt; null until then."""
    steered: LiveSteered | None = None
    """Of a question for what becomes of a text; null until then."""
    circuit: LiveCircuit | None = None
    """Of a circuit; null until then."""


class LiveComponents(BaseModel):
    """What each earlier part of the model gave to a feature at one destination, with pattern and norm frozen."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    sae: str
    """Name of the SAE."""
    index: int
    """Index of the feature in its SAE, counted from 0."""
    tokens: list[int]
    """Ids in the model's vocabulary, one per position."""
    texts: list[str]
    """Tokens as shown, one per position."""
    dest: int
    """The destination: the position asked for, else where the feature is strongest."""
    head: int | None
    """The head asked for; null for all."""
    names: list[str]
    """`embedding`, `position`, `attention 0`, `MLP 0`, ...; then `norm bias` and `value bias` where the model has them."""
    given: list[list[float]]
    """[component][source], of the head asked for or summed over heads; they sum to `dfa`."""
    by_head: list[list[float]]
    """[component][head], sources summed."""
    dfa: list[float]
    """[source]: from values and pattern alone."""
    bias: float
    """The SAE's own: c of its affine map."""
    preact: float
    """w . z + c at the destination, from z alone."""
    gap: float
    """|sum of all components of all heads + bias - preact| / (sum of their sizes + |bias|)."""


class Live:
    """Asks the engine."""

    def __init__(self, settings: Settings, seconds: float = LOAD_SECONDS) -> None:
        self._client = httpx.Client(
            base_url=settings.engine_url,
            headers={SECRET_HEADER: settings.secret},
            timeout=httpx.Timeout(seconds, connect=2.0),
            trust_env=False,  # a proxy has no business between two processes of one machine
        )

    def attribute(self, question: LiveQuestion) -> LiveAttribution:
        """Ask; raises `EngineAway`, or the very error that the engine met."""
        return LiveAttribution.model_validate(self._ask("POST", "/attribute", question.model_dump()))

    def components(self, question: ComponentsQuestion) -> LiveComponents:
        """Ask for the components; raises as `attribute`."""
        return LiveComponents.model_validate(self._ask("POST", "/components", question.model_dump()))

    def firings(self, question: FiringQuestion) -> LiveFirings:
        """Ask what fires; raises as `attribute`."""
        return LiveFirings.model_validate(self._ask("POST", "/firings", question.model_dump()))

    def codes(self, question: TextQuestion) -> LiveCodes:
        """Ask for all that fires; raises as `attribute`."""
        return LiveCodes.model_validate(self._ask("POST", "/codes", question.model_dump()))

    def sources(self, question: SourcesQuestion) -> LiveSources:
        """Ask what source tokens gave; raises as `attribute`."""
        return LiveSources.model_validate(self._ask("POST", "/sources", question.model_dump()))

    def prompt(self, question: PromptQuestion) -> LivePrompt:
        """Ask what fires in several SAEs, and wait for it; raises as `attribute`."""
        return LivePrompt.model_validate(self._ask("POST", "/prompt", question.model_dump()))

    def steer(self, question: SteerQuestion) -> LiveSteered:
        """Ask what becomes of a text when features are changed; raises as `attribute`."""
        return LiveSteered.model_validate(self._ask("POST", "/steer", question.model_dump()))

    def circuit(self, question: CircuitQuestion) -> LiveCircuit:
        """Ask what made a feature or a logit, and wait for it; raises as `attribute`."""
        return LiveCircuit.model_validate(self._ask("POST", "/circuit", question.model_dump()))

    def leave_circuit(self, ticket: str, question: CircuitQuestion, wait: float) -> InLine:
        """The same, put in the line as `leave` does."""
        return InLine.model_validate(self._ask("POST", f"/line/{ticket}/circuit", question.model_dump(), {"wait": wait}))

    def leave(self, ticket: str, question: PromptQuestion, wait: float) -> InLine:
        """Put the question in the line, and wait so many seconds for the answer; raises as `attribute`."""
        return InLine.model_validate(self._ask("POST", f"/line/{ticket}", question.model_dump(), {"wait": wait}))

    def leave_steer(self, ticket: str, question: SteerQuestion, wait: float) -> InLine:
        """The same of a question for what becomes of a text."""
        return InLine.model_validate(self._ask("POST", f"/line/{ticket}/steer", question.model_dump(), {"wait": wait}))

    def look(self, ticket: str, wait: float = 0.0) -> InLine:
        """Where the question is, or its answer; `NotFound` for one that was cancelled or dropped."""
        return InLine.model_validate(self._ask("GET", f"/line/{ticket}", None, {"wait": wait}))

    def cancel(self, ticket: str) -> None:
        """Take the question out of the line."""
        self._ask("DELETE", f"/line/{ticket}")

    def warm(self, sae: str) -> None:
        """Have the model of an SAE loaded, without waiting for it: somebody is about to ask."""
        self._ask("POST", "/warm", {"sae": sae})

    def loaded(self) -> str | None:
        """Name of the model that is warm; `EngineAway` when there is no engine."""
        model: str | None = self._ask("GET", "/health")["model"]
        return model

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def _ask(
        self, method: str, path: str, json: dict[str, object] | None = None, params: dict[str, float] | None = None
    ) -> dict[str, str | None]:
        try:
            response = self._client.request(method, path, json=json, params=params, headers=_onward())
            body: dict[str, object] = response.json()
        except httpx.TimeoutException as error:
            raise EngineAway("The engine takes too long to answer; try again when it has less to do.") from error
        except (httpx.HTTPError, ValueError) as error:
            raise EngineAway("The engine does not answer; start it with `headscope engine`, or `headscope up`.") from error
        if response.is_success:
            return body  # type: ignore[return-value]
        raise _as_error(body, response.status_code)


def _onward() -> dict[str, str]:
    """What tells the engine's lines and spans by which request of ours they were caused."""
    known = logs.request_id.get()
    return {**telemetry.onward(), **({logs.REQUEST_HEADER: known} if known else {})}


def _as_error(body: dict[str, object], status: int) -> HeadscopeError:
    said = body.get("error")
    if not isinstance(said, dict):
        return EngineAway("The engine failed; its log says why.")
    # An error that is made of more than a sentence is not sent, and comes as its parent would.
    every = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HeadscopeError))
    kinds = {kind("").code: kind for kind in every if kind.__init__ is HeadscopeError.__init__}
    error = kinds.get(str(said.get("code")), EngineAway)(str(said.get("message")), field=said.get("field"))
    error.status = status
    return error
