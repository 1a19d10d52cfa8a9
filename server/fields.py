"""What a field of a config may be, and how its values are typed: what command-line options and web forms share. No torch."""

import json
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sae_core.config import Config

NONE = "none"


def is_config(annotation: Any) -> bool:
    """Whether a config is in it."""
    return any(isinstance(part, type) and issubclass(part, Config) for part in parts(annotation))


def parts(annotation: Any) -> list[Any]:
    """The types that it is made of."""
    if get_origin(annotation) is Literal:
        return []
    inner = get_args(annotation)
    return [part for arg in inner for part in parts(arg)] if inner else [annotation]


def choices(annotation: Any) -> list[Any]:
    """What a field may be: the arms of its union, limits stripped, since the model itself checks them."""
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for arm in get_args(annotation) for choice in choices(arm)]
    return [annotation]


def read(info: FieldInfo, value: Any) -> Any:
    """Text as the field's kind of value; what cannot be read stays text, for the model to refuse."""
    if not isinstance(value, str):
        return value
    arms = choices(info.annotation)
    if verbatim(info):
        return split_texts(value) if any(get_origin(choice) is tuple for choice in arms) else value
    if any(get_origin(choice) is dict for choice in arms):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if type(None) in arms and value.strip().lower() == NONE:
        return None
    words = [word for choice in arms if get_origin(choice) is Literal for word in get_args(choice)]
    if value not in words and any(get_origin(choice) is tuple for choice in arms):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def written(value: Any) -> str:
    """A value as one would type it."""
    if value is None or value == ():
        return NONE
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ",".join(map(written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def configs_in(annotation: Any) -> list[type[Config]]:
    """The configs that a field may hold, themselves or in a list."""
    return [part for part in parts(annotation) if is_config(part)]


def config_in(annotation: Any) -> type[Config] | None:
    """The first of them."""
    return next(iter(configs_in(annotation)), None)


def verbatim(info: FieldInfo) -> bool:
    """Whether the spaces of what the field holds count."""
    return isinstance(info.json_schema_extra, dict) and bool(info.json_schema_extra.get("verbatim"))


def split_texts(written: str) -> tuple[str, ...]:
    """Texts apart at commas, their spaces kept. A backslash makes a comma a part of a text; \\n, \\t and \\\\ are as usual."""
    texts, signs = [""], {"n": "\n", "t": "\t", "r": "\r"}
    at = iter(written)
    for sign in at:
        if sign == ",":
            texts.append("")
        elif sign == "\\":
            escaped = next(at, "\\")
            texts[-1] += signs.get(escaped, escaped)
        else:
            texts[-1] += sign
    return tuple(texts)


def joined_texts(texts: Iterable[str]) -> str:
    """Texts as `split_texts` takes them apart."""
    signs = {"\\": "\\\\", ",": "\\,", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return ",".join("".join(signs.get(sign, sign) for sign in text) for text in texts)
