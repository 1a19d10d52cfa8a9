"""Command-line options made from config models: one option per field, helped by the field's own description. No torch."""

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic import ValidationError

from sae_core.config import Config
from sae_core.errors import UsageError

C = TypeVar("C", bound=Config)


def options(model: type[Config], *, skip: Iterable[str] = (), prefix: str = "") -> dict[str, inspect.Parameter]:
    """Keyword parameters for typer, by parameter name; unset ones arrive as None, so that defaults stay the model's."""
    found = {}
    for name, info in model.model_fields.items():
        if name in skip or _is_config(info.annotation):
            continue
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        flag = f"--{prefix}{name}".replace("_", "-")
        shown = "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
        option = typer.Option(flag, help=info.description, show_default=shown)
        annotation = Annotated[_plain(info.annotation) | None, option]  # type: ignore[valid-type]
        key = f"{prefix}{name}".replace("-", "_")
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
    """The fields of `model` among `values` that were set on the command line."""
    keys = {f"{prefix}{name}".replace("-", "_"): name for name in model.model_fields}
    return {keys[key]: value for key, value in values.items() if key in keys and value is not None}


def built(model: type[C], values: dict[str, Any]) -> C:
    """The config, or a sentence that names the option that was wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = "-".join(str(part) for part in first["loc"] if not isinstance(part, int)).replace("_", "-")
        what = first["msg"].removeprefix("Value error, ")
        where = (
            f"--{field} {first['input']}: " if field and not isinstance(first["input"], dict) else f"{field}: " if field else ""
        )
        raise UsageError(f"{where}{what}.", field=field or None) from error


def _is_config(annotation: Any) -> bool:
    return any(isinstance(part, type) and issubclass(part, Config) for part in _parts(annotation))


def _parts(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [part for arg in inner for part in _parts(arg)] if inner else [annotation]


def _plain(annotation: Any) -> Any:
    """The type that the command line reads: limits and None stripped, since the model itself checks them."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(arg for arg in get_args(annotation) if arg is not type(None)))
    return annotation
