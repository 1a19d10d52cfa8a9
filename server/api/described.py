"""What the fields of our dataclasses mean, for the API's document: read from the text under each field, where it is said once."""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

OURS = ("server.store.", "server.api.", "server.pages.")


def describe(schemas: dict[str, Any]) -> None:
    """Give every field of `schemas` (OpenAPI's components) its description, where it has none."""
    known = dict(_documented())
    for name, schema in schemas.items():
        fields = schema.get("properties", {})
        said = known.get((name.rpartition("__")[2], frozenset(fields)), {})
        for field, one in fields.items():
            if field in said and "description" not in one:
                one["description"] = said[field]


def _documented() -> Iterator[tuple[tuple[str, frozenset[str]], Mapping[str, str]]]:
    """(class, names of its fields) and what each field means, of every class of ours that is loaded."""
    for name, module in list(sys.modules.items()):
        if name.startswith(OURS):
            for node in ast.parse(inspect.getsource(module)).body:
                if isinstance(node, ast.ClassDef):
                    fields, said = _fields(node)
                    yield (node.name, frozenset(fields)), said


def _fields(node: ast.ClassDef) -> tuple[list[str], dict[str, str]]:
    fields: list[str] = []
    said: dict[str, str] = {}
    for before, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            fields.append(before.target.id)
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                said[before.target.id] = inspect.cleandoc(after.value.value)
    return fields, said
