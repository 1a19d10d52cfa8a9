"""What the fields of our types mean, for the API's document: read from the text under each field, where it is said once. What
is called the same everywhere, and means the same everywhere, is said here instead."""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

OURS = ("server.store.", "server.api.", "server.pages.")

WORDS: Mapping[str, str] = {
    "arch": "Architecture of the SAE: relu, gated, topk, batchtopk, jumprelu, matryoshka.",
    "author": "Who wrote it.",
    "band": "0: one of the strongest examples; 1 and up: drawn from that band of activation, strongest band first.",
    "config": "All settings that it was made with, by name.",
    "corpus": "Name of the corpus that was swept.",
    "count": "How many there are.",
    "created_at": "When it was made, in UTC.",
    "d_head": "Width of a head's part of z.",
    "d_in": "Width of what the SAE reads: heads times width of a head.",
    "d_sae": "Features of the SAE, dead ones too.",
    "deleted_at": "When it was deleted, in UTC; null while it is not.",
    "deleted_by": "Who deleted it.",
    "density": "Share of the sweep's tokens on which it fires.",
    "dest": "Position of the destination: the token on which the feature fires.",
    "family": "What the feature seems to do, in one word; null where it is unclear, or was not measured.",
    "head": "The head, counted from 0.",
    "heads": "One for each head, in order.",
    "high": "Where the range ends.",
    "id": "The number or name that addresses call it by.",
    "index": "Index of the feature in its SAE, counted from 0.",
    "kind": "Which kind of job it is.",
    "layer": "Layer of the model, counted from 0.",
    "low": "Where the range begins.",
    "max_act": "Its strongest activation on any token of the sweep.",
    "mean_act": "Mean of its activations, over the tokens on which it fires.",
    "metrics": "What was measured of the SAE, by name; see the page of evaluation in the documentation.",
    "model": "Name of the model.",
    "n_examples": "Examples that were kept.",
    "n_fired": "Tokens of the sweep on which it fires.",
    "n_heads": "Heads of a layer, as queries count them.",
    "n_layers": "Layers of the model.",
    "n_live": "Features that fired at all.",
    "n_tokens": "Tokens that were swept.",
    "name": "What it is called.",
    "phase": "What it is at, in words; null before it begins.",
    "promoted": "Tokens that the feature promotes most, the strongest first.",
    "rank": "Place of the example within its band, counted from 0.",
    "row": "Number of the row of text, counted from 0 in the corpus.",
    "status": "Where it stands.",
    "text": "What it says.",
    "texts": "The row's tokens as shown, one per position.",
    "tokens": "Ids of the tokens in the model's vocabulary, one per position.",
    "value": "How much it is.",
    "verdict": "The family in words.",
}
"""A word -> what it means. A type that means something else by it says so under its field."""


def describe(schemas: dict[str, Any]) -> None:
    """Give every field of `schemas` (OpenAPI's components) its description, where it has none."""
    known = dict(_documented())
    for name, schema in schemas.items():
        fields = schema.get("properties", {})
        said = known.get((name.rpartition("__")[2], frozenset(fields)), {})
        for field, one in fields.items():
            if "description" not in one and (text := said.get(field) or WORDS.get(field)):
                one["description"] = text


def _documented() -> Iterator[tuple[tuple[str, frozenset[str]], Mapping[str, str]]]:
    """(class, names of its fields) and what each field means, of every class of ours that is loaded."""
    sources: dict[str, dict[str, str]] = {}
    classes = []
    for name, module in list(sys.modules.items()):
        if name.startswith(OURS):
            for node in ast.parse(inspect.getsource(module)).body:
                if isinstance(node, ast.ClassDef):
                    sources[f"{name}.{node.name}"] = _fields(node)
                    classes.append(vars(module)[node.name])
    for one in classes:
        fields: set[str] = set()
        said: dict[str, str] = {}
        for base in reversed(one.__mro__):  # a class may have fields of those that it is made of, and say them better
            fields |= set(vars(base).get("__annotations__", {}))
            said |= sources.get(f"{base.__module__}.{base.__qualname__}", {})
        yield (one.__name__, frozenset(fields)), said


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """What is written under the fields of a class."""
    said: dict[str, str] = {}
    for before, after in zip(node.body, node.body[1:], strict=False):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(text, str):
            said[before.target.id] = inspect.cleandoc(text)
    return said
