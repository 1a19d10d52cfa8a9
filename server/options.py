"""Command-line options made from config models: one option per field, helped by the field's own description. No torch.

A list is one option with commas (`--ks 16,32`), a switch has two sides (`--scaling/--no-scaling`), and a field that may
be None takes the word `none`.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import ValidationError

from sae_core.config import Config
from sae_core.errors import UsageError
from server.fields import NONE, choices, config_in, is_config, read, written

C = TypeVar("C", bound=Config)


def options(model: type[Config], *, skip: Iterable[str] = (), prefix: str = "") -> dict[str, inspect.Parameter]:
    """Keyword parameters for typer, by parameter name; unset ones arrive as None, so that defaults stay the model's."""
    found = {}
    for name, info in model.model_fields.items():
        if name in skip or is_config(info.annotation):
            continue
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        key = f"{prefix}{name}".replace("-", "_")
        flag = f"--{key}".replace("_", "-")
        typed = _typed(info.annotation)
        names = (f"{flag}/--no-{key}".replace("_", "-"),) if typed is bool else (flag,)
        option = typer.Option(
            *names, help=info.description, show_default=written(default), metavar=_metavar(info.annotation, typed)
        )
        annotation = Annotated[typed | None, option]  # type: ignore[valid-type]
        found[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    return found


def takes(*groups: dict[str, inspect.Parameter]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command whose `**given` stands for these options, so that typer sees each of them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [parameter for group in groups for parameter in group.values()]
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        return command

    return decorate


def given(values: dict[str, Any], model: type[Config], *, prefix: str = "") -> dict[str, Any]:
    """The fields of `model` among `values` that were set on the command line; the model has not checked them yet."""
    keys = {f"{prefix}{name}".replace("-", "_"): name for name in model.model_fields}
    return {
        keys[key]: read(model.model_fields[keys[key]], value)
        for key, value in values.items()
        if key in keys and value is not None
    }


def built(model: type[C], values: dict[str, Any], flags: Mapping[str, str] | None = None) -> C:
    """The config, or a sentence that names the option that was wrong.

    `flags` says how fields of inner configs are called on the command line, by their dotted path (`rows.seed`) or, for all
    the fields of one, by the path and a dot (`rows.`); what stands there comes before the field's own name.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refusal(model, error, flags or {}) from error


def _refusal(model: type[Config], error: ValidationError, flags: Mapping[str, str]) -> UsageError:
    first = error.errors()[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ValidationError):  # of a config that this one makes
        return _refusal(model, inner, flags)
    what = first["msg"].removeprefix("Value error, ")
    field = _flag(model, first["loc"], flags)
    if field:
        value = "" if isinstance(first["input"], dict) else f" {written(first['input'])}"
        return UsageError(f"--{field}{value}: {what}.", field=field)
    named = _mentioned(model, what, flags)
    said = ", ".join(f"--{name}" for name in named)
    return UsageError(f"{what}{f' ({said})' if said else ''}.", field=named[0] if named else None)


# ---- types ----


def _typed(annotation: Any) -> Any:
    """The type that the command line reads: a number where only numbers can stand, else text that `read` takes apart."""
    arms = choices(annotation)
    return arms[0] if len(arms) == 1 and arms[0] in (int, float, bool, str) else str


def _metavar(annotation: Any, typed: Any) -> str | None:
    """What the help shows where the value goes; None leaves it to the type."""
    shown = [_kind(choice) for choice in choices(annotation)]
    return None if typed is not str or shown == ["<str>"] else "|".join(shown)


def _kind(choice: Any) -> str:
    if choice is type(None):
        return NONE
    if get_origin(choice) is Literal:
        return "|".join(map(str, get_args(choice)))
    if get_origin(choice) is tuple:
        return f"{_kind(choices(get_args(choice)[0])[0])},..."
    return {int: "<int>", float: "<float>"}.get(choice, "<str>")


# ---- names ----


def _flag(model: type[Config], loc: tuple[int | str, ...], flags: Mapping[str, str]) -> str:
    """The option that a place in a config is set by, without its dashes; empty where the place is the whole config."""
    path: list[str] = []
    inner: Any = model
    for part in loc:  # beside fields, a place holds positions in lists and the arms of unions
        if isinstance(part, str) and inner is not None and part in inner.model_fields:
            path.append(part)
            inner = config_in(inner.model_fields[part].annotation)
        elif isinstance(part, str) and inner is not None and not path:
            path.append(part)  # a field that the config does not have
            inner = None
    return _named(path, flags)


def _named(path: list[str], flags: Mapping[str, str]) -> str:
    dotted = ".".join(path)
    if dotted in flags:
        return flags[dotted]
    above = ".".join(path[:-1]) + "."
    name = f"{flags[above]}{path[-1]}" if len(path) > 1 and above in flags else "-".join(path)
    return name.replace("_", "-")


def _mentioned(model: type[Config], sentence: str, flags: Mapping[str, str]) -> list[str]:
    """The options whose fields a sentence about the whole config names, in its order."""
    places = {
        _named(path, flags): found.start()
        for path in _paths(model)
        if (found := re.search(rf"(?<![\w/]){path[-1]}(?!\w)", sentence))
    }
    return sorted(places, key=lambda name: places[name])


def _paths(model: type[Config], before: tuple[str, ...] = ()) -> Iterator[list[str]]:
    for name, info in model.model_fields.items():
        inner = config_in(info.annotation)
        if get_origin(info.annotation) is dict:
            continue
        if inner is None:
            yield [*before, name]
        elif name in ("rows", "base"):
            yield from _paths(inner, (*before, name))
