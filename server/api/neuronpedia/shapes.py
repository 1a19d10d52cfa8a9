"""The rows that Neuronpedia answers with, filled from our store. Where we have no such thing, a field is empty, not made up."""

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from server.api.neuronpedia.wire import OURS, Shape, utc
from server.store.labels import PERSON
from server.store.neurons import Explained, Firing, Neuron
from server.store.saes import Door
from server.store.sources import Source, SourceRef

HUMAN = "human"
"""What Neuronpedia calls the kind of an explanation that a person wrote."""


# ---- models and sources ----


class ModelRow(Shape):
    """A model."""

    id: str
    display_name_short: str
    display_name: str
    creator_id: str = OURS
    tlens_id: str | None = None
    dimension: int | None
    visibility: str = "PUBLIC"
    inference_enabled: bool = True
    layers: int
    neurons_per_layer: int = 0
    owner: str = ""
    website: str | None = None
    created_at: datetime
    updated_at: datetime


class SourceRow(Shape):
    """An SAE."""

    id: str
    model_id: str
    set_name: str
    has_dashboards: bool
    inference_enabled: bool = True
    saelens_config: None = None
    visibility: str = "PUBLIC"
    creator_id: str = OURS
    has_umap: bool = False
    has_umap_log_sparsity: bool = False
    has_umap_clusters: bool = False
    num_prompts: int | None = None
    num_tokens_in_prompt: int | None = None
    dataset: str | None = None
    notes: str | None = None
    created_at: datetime


class SourceSetRow(Shape):
    """SAEs with one name, of one or several layers."""

    model_id: str
    name: str
    has_dashboards: bool = True
    allow_inference_search: bool = True
    visibility: str = "PUBLIC"
    description: str = ""
    type: str = "attention output"
    creator_name: str = OURS
    urls: list[str] = []
    creator_id: str = OURS
    release_name: str | None = None
    default_range: int = 1
    default_show_breaks: bool = True
    show_dfa: bool = True
    show_correlated: bool = False
    show_head_attribution: bool = True
    show_umap: bool = False
    created_at: datetime


class SourceSetWithSources(SourceSetRow):
    """A set as `/api/source-set` gives it."""

    sources: list[SourceRow]
    releases: None = None
    model: ModelRow


def model_row(ref: SourceRef) -> ModelRow:
    """The model that an id means, under the name that it was asked for by."""
    made = utc(ref.model.created_at)
    return ModelRow(
        id=ref.model_id, display_name_short=ref.model.name, display_name=ref.model.name, dimension=ref.model.d_model,
        layers=ref.model.n_layers or 0, created_at=made, updated_at=made,
    )  # fmt: skip


def source_row(ref: SourceRef, door: Door) -> SourceRow:
    """An SAE, under the id that it was asked for by."""
    harvest = door.sae.harvest
    return SourceRow(
        id=ref.id, model_id=ref.model_id, set_name=ref.set, has_dashboards=harvest is not None,
        num_prompts=harvest.n_rows if harvest else None, num_tokens_in_prompt=harvest.context if harvest else None,
        dataset=harvest.corpus if harvest else None, notes=door.description, created_at=utc(door.created_at),
    )  # fmt: skip


def set_row(ref: SourceRef, door: Door) -> SourceSetRow:
    """The set of one SAE."""
    return SourceSetRow(
        model_id=ref.model_id, name=ref.set, description=door.description or "", created_at=utc(door.created_at)
    )  # fmt: skip


# ---- features ----


class Check(Shape):
    """What Neuronpedia's rows have no field for: `dfaValues`, `dropped`, `before` and `bias` sum to `preact`."""

    row: int
    """Of the corpus."""
    band: int
    """0: the strongest; 1 and up: drawn from the bands of activation."""
    rank: int
    dfa_by_head: list[float]
    """What each head gave at the destination, all sources counted."""
    dropped: float
    """DFA of the tokens shown that was too small to be kept by source."""
    before: float
    """DFA of sources before the first token shown."""
    bias: float
    preact: float


class ActivationRow(Shape):
    """An example. Every index counts from the first of `tokens`."""

    id: str
    model_id: str
    layer: str
    source: str
    """`layer` again: the published client reads this name."""
    index: str
    creator_id: str = OURS
    data_index: str | None
    data_source: str | None
    tokens: tuple[str, ...]
    values: list[float]
    max_value: float
    max_value_token_index: int
    min_value: float
    dfa_values: list[float]
    dfa_target_index: int | None
    """The destination, always; None where no DFA is stored."""
    dfa_max_value: float | None
    z_q_indices: list[int] = []
    z_k_indices: list[int] = []
    z_values: list[float] = []
    loss_values: list[float] = []
    logit_contributions: str | None = None
    bin_min: float | None
    bin_max: float | None
    bin_contains: float | None
    qualifying_token_index: int
    created_at: datetime
    headscope: Check


class ExplanationRow(Shape):
    """A label."""

    id: str
    model_id: str
    layer: str
    source: str
    index: str
    description: str
    explanation_model_name: str | None
    type_name: str
    author_id: str
    author: dict[str, str]
    triggered_by_user: dict[str, str]
    scores: list[float] = []
    votes: list[int] = []
    created_at: datetime


class About(Shape):
    """What a harvest says of a feature, and Neuronpedia's rows have no field for."""

    n_fired: int
    family: str | None
    verdict: str | None


class NeuronRow(Shape):
    """A feature."""

    model_id: str
    layer: str
    index: str
    source_set_name: str
    creator_id: str = OURS
    created_at: datetime
    max_act_approx: float
    has_vector: bool = False
    vector: list[float] = []
    vector_label: str | None = None
    vector_default_steer_strength: float | None = None
    hook_name: str
    topk_cos_sim_indices: list[int]
    topk_cos_sim_values: list[float]
    neuron_alignment_indices: list[int] = []
    neuron_alignment_values: list[float] = []
    neuron_alignment_l1: list[float] = []
    correlated_neurons_indices: list[int] = []
    correlated_neurons_pearson: list[float] = []
    correlated_neurons_l1: list[float] = []
    correlated_features_indices: list[int] = []
    correlated_features_pearson: list[float] = []
    correlated_features_l1: list[float] = []
    neg_str: list[str]
    neg_values: list[float]
    pos_str: list[str]
    pos_values: list[float]
    frac_nonzero: float
    freq_hist_data_bar_heights: list[float]
    freq_hist_data_bar_values: list[float]
    logits_hist_data_bar_heights: list[float]
    logits_hist_data_bar_values: list[float]
    decoder_weights_dist: list[float]
    umap_cluster: int | None = None
    umap_log_feature_sparsity: float | None = None
    umap_x: float | None = None
    umap_y: float | None = None
    activations: list[ActivationRow]
    explanations: list[ExplanationRow]
    headscope: About


class NeuronWithModel(NeuronRow):
    """A feature as searches give it."""

    model: ModelRow


class NeuronOfSet(NeuronWithModel):
    """A feature as a page of them gives it."""

    source_set: SourceSetRow


def activation_row(source: Source, index: int, firing: Firing) -> ActivationRow:
    """An example of a feature."""
    harvest = source.door.sae.harvest
    strongest = max(firing.values)
    return ActivationRow(
        id=f"{harvest.id if harvest else 0}-{firing.id}",
        model_id=source.ref.model_id,
        layer=source.ref.id,
        source=source.ref.id,
        index=str(index),
        data_index=str(firing.row),
        data_source=harvest.corpus if harvest else None,
        tokens=firing.tokens,
        values=firing.values,
        max_value=strongest,
        max_value_token_index=firing.values.index(strongest),
        min_value=min(firing.values),
        dfa_values=firing.dfa,
        dfa_target_index=firing.dest if firing.dfa else None,
        dfa_max_value=max(firing.dfa, default=None),
        bin_min=firing.low,
        bin_max=firing.high,
        bin_contains=firing.share,
        qualifying_token_index=firing.dest,
        created_at=utc(harvest.published_at if harvest else None),
        headscope=Check(
            row=firing.row, band=firing.band, rank=firing.rank, dfa_by_head=firing.by_head, dropped=firing.dropped,
            before=firing.before, bias=firing.bias, preact=firing.preact,
        ),
    )  # fmt: skip


def explanation_row(ref: SourceRef, index: int, label: Explained) -> ExplanationRow:
    """A label of a feature."""
    person = label.method == PERSON
    return ExplanationRow(
        id=str(label.id), model_id=ref.model_id, layer=ref.id, source=ref.id, index=str(index), description=label.text,
        explanation_model_name=None if person else label.method, type_name=HUMAN if person else label.method,
        author_id=label.author, author={"name": label.author}, triggered_by_user={"id": label.author, "name": label.author},
        created_at=utc(label.created_at),
    )  # fmt: skip


def neuron_row(source: Source, neuron: Neuron) -> NeuronRow:
    """A feature alone."""
    return NeuronRow(**neuron_fields(source, neuron))


def neuron_fields(source: Source, neuron: Neuron) -> dict[str, Any]:
    """The fields of a `NeuronRow`."""
    ref, sae = source.ref, source.door.sae
    near, cosines = zip(*neuron.neighbours, strict=True) if neuron.neighbours else ((), ())
    return {
        "model_id": ref.model_id,
        "layer": ref.id,
        "index": str(neuron.index),
        "source_set_name": ref.set,
        "created_at": utc(sae.harvest.published_at if sae.harvest else None),
        "max_act_approx": neuron.max_act,
        "hook_name": sae.hook,
        "topk_cos_sim_indices": list(near),
        "topk_cos_sim_values": list(cosines),
        "neg_str": [token.text for token in neuron.suppressed],
        "neg_values": [token.value for token in neuron.suppressed],
        "pos_str": [token.text for token in neuron.promoted],
        "pos_values": [token.value for token in neuron.promoted],
        "frac_nonzero": neuron.density,
        "freq_hist_data_bar_heights": list(neuron.histogram[1]),
        "freq_hist_data_bar_values": _middles(neuron.histogram[0]),
        "logits_hist_data_bar_heights": list(neuron.logits[1]),
        "logits_hist_data_bar_values": _middles(neuron.logits[0]),
        "decoder_weights_dist": list(neuron.head_shares),
        "activations": [activation_row(source, neuron.index, firing) for firing in neuron.firings],
        "explanations": [explanation_row(ref, neuron.index, label) for label in neuron.explained],
        "headscope": About(n_fired=neuron.n_fired, family=neuron.family, verdict=neuron.verdict),
    }


def _middles(edges: Sequence[float]) -> list[float]:
    return [float(f"{(low + high) / 2:.6g}") for low, high in pairwise(edges)]
