"""`/api`: the API's documentation, made from its own document by our own template: the strict policy lets no other site's
scripts in, and none is needed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Request, Response

from server.api.v1 import DOCUMENT
from server.pages.reply import etag, origin, reply, unchanged

router = APIRouter()

LONGEST_CHOICE = 12
"""Words of a choice that are listed; of more, the first."""


class TypeSaid(NamedTuple):
    """A type in words, and the type of ours that it is made of."""

    words: str
    name: str | None


class FieldSaid(NamedTuple):
    """A parameter or a field."""

    name: str
    type: TypeSaid
    required: bool
    default: str | None
    description: str


@dataclass(frozen=True)
class Operation:
    """One thing that can be asked."""

    id: str
    method: str
    path: str
    summary: str
    description: str
    parameters: tuple[FieldSaid, ...]
    body: TypeSaid | None
    body_fields: tuple[FieldSaid, ...]
    status: str
    answer: TypeSaid | None
    """None where it is a file or a stream."""
    answer_said: str
    answer_fields: tuple[FieldSaid, ...]
    refusals: tuple[tuple[str, str], ...]
    """(status, what it means)"""
    curl: str
    python: str
    example: str | None


@dataclass(frozen=True)
class Group:
    """Operations about one subject."""

    name: str
    operations: tuple[Operation, ...]

    @property
    def slug(self) -> str:
        """Its place on the page."""
        return self.name.lower().replace(" ", "-")


class TypeOf(NamedTuple):
    """A type with its fields."""

    name: str
    description: str
    fields: tuple[FieldSaid, ...]


@dataclass(frozen=True)
class ApiPage:
    """All of it."""

    version: str
    description: str
    groups: tuple[Group, ...]
    types: tuple[TypeOf, ...]


@router.get("/api", include_in_schema=False)
def api_page(request: Request) -> Response:
    """The documentation, as a page."""
    here = origin(request)
    tag = etag(request, "api", here)
    if known := unchanged(request, tag):
        return known
    page = Reading(DOCUMENT.openapi, here).page
    return reply(request, page, "api.html", tag=tag)


class Reading:
    """A document as a page tells it."""

    def __init__(self, document: Mapping[str, Any], origin: str) -> None:
        self._document, self._origin = document, origin
        self._types: Mapping[str, Any] = document["components"]["schemas"]

    @cached_property
    def page(self) -> ApiPage:
        """The whole page."""
        groups: dict[str, list[Operation]] = {tag["name"]: [] for tag in self._document["tags"]}
        for path, operations in self._document["paths"].items():
            for method, operation in operations.items():
                groups[operation["tags"][0]].append(self._operation(method.upper(), path, operation))
        return ApiPage(
            version=self._document["info"]["version"],
            description=self._document["info"]["description"],
            groups=tuple(Group(name, tuple(found)) for name, found in groups.items()),
            types=tuple(
                TypeOf(name, one.get("description", ""), tuple(self._fields(one)))
                for name, one in sorted(self._types.items())
                if one.get("properties")
            ),
        )

    def _operation(self, method: str, path: str, operation: Mapping[str, Any]) -> Operation:
        body = self._json(operation.get("requestBody", {}))
        status = next(iter(sorted(operation["responses"])))
        answered = operation["responses"][status]
        answer, given = self._json(answered), self._resolved(self._json(operation.get("requestBody", {})) or {})
        sent = _example(operation.get("requestBody", {})) or (self._body(given) if body else None)
        example = _example(answered)
        refused = {code: one["description"] for code, one in operation["responses"].items() if not code.startswith("2")}
        return Operation(
            id=operation["operationId"],
            method=method,
            path=path,
            summary=operation["summary"],
            description=operation["description"],
            parameters=tuple(self._parameter(one) for one in operation.get("parameters", ())),
            body=self._said(body) if body else None,
            body_fields=tuple(self._fields(given)),
            status=status,
            answer=self._said(answer) if answer else None,
            answer_said="" if answer else f"{answered['description']} ({', '.join(answered.get('content', ()))})",
            answer_fields=tuple(self._fields(self._resolved(answer or {}))),
            refusals=tuple(sorted(refused.items())),
            **self._calls(method, path, operation, sent),
            example=None if example is None else json.dumps(example, ensure_ascii=False, indent=1),
        )

    # ---- types ----

    def _json(self, part: Mapping[str, Any]) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = part.get("content", {}).get("application/json", {}).get("schema")
        return found

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in schema:
            schema = self._types[schema["$ref"].rpartition("/")[2]]
        return schema

    def _said(self, schema: Mapping[str, Any]) -> TypeSaid:
        """A schema in words."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return TypeSaid("", name) if self._types[name].get("properties") else self._said(self._types[name])
        if "const" in schema:
            return TypeSaid(json.dumps(schema["const"]), None)
        if "enum" in schema:
            words = [str(word) for word in schema["enum"]]
            more = ", …" if len(words) > LONGEST_CHOICE else ""
            return TypeSaid(f"one of {', '.join(words[:LONGEST_CHOICE])}{more}", None)
        arms = schema.get("anyOf") or schema.get("oneOf")
        if arms:
            present = [self._said(arm) for arm in arms if arm.get("type") != "null"]
            null = " or null" if len(present) < len(arms) else ""
            if len(present) == 1:
                return TypeSaid(f"{present[0].words}{null}", present[0].name)
            return TypeSaid(" or ".join(one.name or one.words for one in present) + null, None)
        kind = schema.get("type", "anything")
        if kind == "array":
            inner = self._said(schema["items"]) if "items" in schema else TypeSaid("anything", None)
            return TypeSaid(f"list of {inner.words}".rstrip() if inner.name is None else "list of", inner.name)
        if kind == "object":
            values = schema.get("additionalProperties")
            return TypeSaid(f"object of {self._said(values).words}" if isinstance(values, dict) and values else "object", None)
        return TypeSaid(f"{kind}{_bounds(schema)}", None)

    def _fields(self, schema: Mapping[str, Any]) -> Iterator[FieldSaid]:
        required = schema.get("required", ())
        for name, one in schema.get("properties", {}).items():
            yield FieldSaid(name, self._said(one), name in required, _default(one), one.get("description", ""))

    def _parameter(self, one: Mapping[str, Any]) -> FieldSaid:
        where = "" if one["in"] == "query" else f" ({one['in']})"
        schema = one["schema"]
        return FieldSaid(
            f"{one['name']}{where}", self._said(schema), one["required"], _default(schema), one.get("description", "")
        )

    # ---- how to ask ----

    def _calls(self, method: str, path: str, operation: Mapping[str, Any], body: Any) -> dict[str, str]:
        """The same question by curl and by Python."""
        query: dict[str, Any] = {}
        for one in operation.get("parameters", ()):
            examples = one["schema"].get("examples") or []
            if one["in"] == "path":
                path = path.replace("{" + one["name"] + "}", quote(str(examples[0] if examples else 1), safe=""))
            elif one["in"] == "query" and (examples or one["required"]):
                query[one["name"]] = examples[0] if examples else "1"
        signed = any(one["name"] == "X-Author" for one in operation.get("parameters", ()))
        asked = f"?{urlencode(query, safe=',')}" if query else ""
        address = f"{self._origin}{path}{asked}"
        curl = [f"curl {'' if method == 'GET' else f'-X {method} '}'{address}'"]
        curl += [" -H 'X-Author: Maren'"] if signed else []
        curl += [f" -H 'Content-Type: application/json' -d '{json.dumps(body)}'"] if body is not None else []
        options = [f"params={query!r}"] if query else []
        options += ['headers={"X-Author": "Maren"}'] if signed else []
        options += [f"json={body!r}"] if body is not None else []
        call = ", ".join([f'"{self._origin}{path}"', *options])
        kind = next(iter(next(iter(operation["responses"].values())).get("content", {"": None})))
        ending = {"application/json": ".json()", "text/event-stream": ".text"}.get(kind, ".content")
        return {"curl": " \\\n ".join(curl), "python": f"import httpx\n\nhttpx.{method.lower()}({call}){ending}"}

    def _body(self, schema: Mapping[str, Any]) -> Any:
        """A small body of this schema: what is required, from the fields' own examples."""
        return {
            name: self._value(one)
            for name, one in schema.get("properties", {}).items()
            if name in schema.get("required", ()) or one.get("examples")
        }

    def _value(self, schema: Mapping[str, Any]) -> Any:
        schema = self._resolved(schema)
        if examples := schema.get("examples"):
            return examples[0]
        kind = schema.get("type")
        if kind == "array":
            return [self._value(schema["items"])]
        if kind == "object":
            return self._body(schema)
        return {"integer": 3, "number": 0.5, "boolean": True}.get(str(kind), "smollm2-l17")


def _example(part: Mapping[str, Any]) -> Any:
    return part.get("content", {}).get("application/json", {}).get("example")


def _default(schema: Mapping[str, Any]) -> str | None:
    value = schema.get("default")
    return None if value is None or value == "" or isinstance(value, dict) else json.dumps(value)


def _bounds(schema: Mapping[str, Any]) -> str:
    """The limits of a number or of a text's length, in words."""
    pairs: Sequence[tuple[str, str]] = (
        ("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"), ("exclusiveMaximum", "below"),
        ("maxLength", "at most"),
    )  # fmt: skip
    said = [f"{words} {schema[name]:g}{' characters' if name == 'maxLength' else ''}" for name, words in pairs if name in schema]
    return f", {' and '.join(said)}" if said else ""
