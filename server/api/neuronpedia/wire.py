"""How Neuronpedia's addresses take requests and answer: names of fields, ids, addresses with and without a slash at the end."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic_core import to_json

from sae_core.errors import NotFound

WITH_UNDERSCORES = frozenset(
    (
        *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
        *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
        *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
        *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "decoder_weights_dist"),
        *("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
        *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
        *("umap_cluster", "umap_log_feature_sparsity", "umap_x", "umap_y"),
        *("num_prompts", "num_tokens_in_prompt", "cosine_similarity"),
        *("n_tokens", "strength_multiplier", "steer_method"),
    )
)
"""The names that Neuronpedia writes with underscores, each; all others are in camel case."""
OURS = "headscope"
"""What its rows name as their creator."""

Function = TypeVar("Function", bound=Callable[..., Response])


def wire_name(field: str) -> str:
    """The name of a field as Neuronpedia writes it."""
    return field if field in WITH_UNDERSCORES else to_camel(field)


class Shape(BaseModel):
    """An object as it travels. What is not known of it is ignored, as Neuronpedia does."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", alias_generator=wire_name, validate_by_name=True, use_attribute_docstrings=True
    )


def _plain(text: str) -> str:
    if "\0" in text:
        raise ValueError("the character 0 is in no name")
    return text


def _index(given: object) -> object:
    # A float or a truth value is no index, though Python would take it for one.
    if isinstance(given, bool | float):
        raise ValueError("an index is a whole number, 14057 or '14057'")
    return given


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain)]
"""An id, or part of one."""
Index = Annotated[int, BeforeValidator(_index), Field(ge=0, le=2**31 - 1)]
"""A feature's index, as a number or as text."""


class At(Shape):
    """A feature as requests name it."""

    model_id: Name
    layer: Name
    index: Index


def index_of(text: str) -> int:
    """The index in an address; NotFound where it is none."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise NotFound(f"There is no feature '{text[:40]}': an index is a whole number.", field="index")
    return int(text)


def answer(value: Any) -> Response:
    """`value`, made of shapes, as JSON."""
    body = to_json(value, by_alias=True, inf_nan_mode="null")
    return Response(body, media_type="application/json", headers={"Cache-Control": "private, no-cache"})


def utc(at: datetime | None) -> datetime:
    """A time with its zone; SQLite gives ours without, all in UTC. The present where there is none."""
    return datetime.now(UTC) if at is None else at.replace(tzinfo=at.tzinfo or UTC)


class Addresses(APIRouter):
    """Routes that answer with and without a slash at the end: a redirect would cost some clients what they posted."""

    def get_at(self, path: str) -> Callable[[Function], Function]:
        """Answer GET there."""
        return self._at(path, "GET")

    def post_at(self, path: str) -> Callable[[Function], Function]:
        """Answer POST there."""
        return self._at(path, "POST")

    def _at(self, path: str, method: str) -> Callable[[Function], Function]:
        def register(function: Function) -> Function:
            for address in (path, f"{path}/"):
                self.add_api_route(address, function, methods=[method], response_model=None, include_in_schema=False)
            return function

        return register
