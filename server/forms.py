"""Web forms made from config models: one input per field, helped by the field's own description. No torch.

What was typed stays text until the model reads it, so a refusal can stand beside its input with nothing lost. An input is
named by its field's path: `rows.context`, `harvests.0.tokens`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sae_core.config import Config
from sae_core.errors import HeadscopeError
from server.fields import choices, config_in, read, written

C = TypeVar("C", bound=Config)
Kind = Literal["number", "text", "choice"]


class Input(NamedTuple):
    """A field as a form shows it."""

    name: str
    label: str
    help: str
    kind: Kind
    value: str
    default: str
    options: tuple[str, ...]
    """What can be chosen; of a text, what is suggested."""
    required: bool
    error: str

    @property
    def changed(self) -> bool:
        """Whether it holds something else than the default."""
        return not self.required and self.value != self.default


class Group(NamedTuple):
    """Inputs that belong together."""

    name: str
    words: str
    inputs: tuple[Input, ...]
    first: bool
    """Shown open, as what most people set."""

    @property
    def title(self) -> str:
        """The group in words: `harvests.0` is the first harvest."""
        name, _, place = self.name.partition(".")
        if not place.isdigit():
            return self.name.replace(".", " ") or "everything else"
        return name.removesuffix("s") if place == "0" else f"{name.removesuffix('s')} {int(place) + 1}"

    @property
    def open(self) -> bool:
        """Shown open at once: what is wrong or was changed must be seen."""
        return self.first or any(one.error or one.changed for one in self.inputs)


class Filled(NamedTuple, Generic[C]):
    """A form that was sent: the config, or what is wrong with it by input; `` holds what is about the whole."""

    config: C | None
    errors: dict[str, str]


def typed(config: Mapping[str, Any]) -> dict[str, str]:
    """A stored config as one would type it, by input."""
    return dict(_typed(config, ""))


def _typed(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _typed(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        for place, inner in enumerate(value):
            yield from _typed(inner, f"{path}.{place}")
    else:
        yield path, exactly(value)


def exactly(value: Any) -> str:
    """A value as text that reads back as the very same."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple):
        return ",".join(map(exactly, value))
    return written(value)


def groups(
    model: type[Config],
    values: Mapping[str, str],
    errors: Mapping[str, str],
    *,
    first: Iterable[str],
    known: Mapping[str, Iterable[str]],
) -> list[Group]:
    """The form's groups: `first` in front, then each config's own fields. `known` has what can stand in a field."""
    every = {one.name: one for one in _inputs(model, values, errors, known)}
    front = tuple(every.pop(name) for name in first)
    found = [Group("", "", front, True)]
    rest: dict[str, list[Input]] = {}
    for one in every.values():
        rest.setdefault(one.name.rpartition(".")[0], []).append(one)
    return found + [Group(name, _words(model, name), tuple(inputs), False) for name, inputs in sorted(rest.items())]


def _words(model: type[Config], path: str) -> str:
    """What a group is about: the description of the field that holds it."""
    info = _info(model, path)
    return "" if info is None else info.description or ""


def _inputs(
    model: type[Config],
    values: Mapping[str, str],
    errors: Mapping[str, str],
    known: Mapping[str, Iterable[str]],
    path: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[Input]:
    for name, info in model.model_fields.items():
        at = f"{path}.{name}" if path else name
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        default = defaults.get(name, default) if defaults is not None else default
        inner = config_in(info.annotation)
        if inner is None:
            if get_origin(info.annotation) is not dict:
                yield _input(at, info, default, values, errors, known)
        elif _many(info):
            stored = default if isinstance(default, tuple) else ()
            for place in sorted(_places(values, at) or range(len(stored))):
                base = stored[place].model_dump() if place < len(stored) else None
                yield from _inputs(inner, values, errors, known, f"{at}.{place}", base)
        else:
            yield from _inputs(inner, values, errors, known, at, default.model_dump() if default is not None else None)


def _many(info: FieldInfo) -> bool:
    """Whether the field holds a list of configs."""
    return any(get_origin(choice) is tuple for choice in choices(info.annotation))


def _places(values: Mapping[str, str], path: str) -> set[int]:
    return {int(found[1]) for name in values if (found := re.match(rf"{re.escape(path)}\.(\d{{1,2}})\.", name))}


def _input(
    at: str,
    info: FieldInfo,
    default: Any,
    values: Mapping[str, str],
    errors: Mapping[str, str],
    known: Mapping[str, Iterable[str]],
) -> Input:
    arms = choices(info.annotation)
    words = tuple(str(word) for arm in arms if get_origin(arm) is Literal for word in get_args(arm))
    options = tuple(known.get(at, ())) or (("on", "off") if arms == [bool] else words)
    only = arms == [bool] or all(get_origin(arm) is Literal for arm in arms) or (at in known and not _many(info))
    kind: Kind = "choice" if only else "number" if set(arms) <= {int, float, type(None)} else "text"
    required = info.is_required()
    shown = "" if required else exactly(default)
    return Input(
        name=at,
        label=at.rpartition(".")[2].replace("_", " "),
        help=info.description or "",
        kind=kind,
        value=values.get(at, shown),
        default=shown,
        options=options,
        required=required,
        error=errors.get(at, ""),
    )


def filled(model: type[C], values: Mapping[str, str]) -> Filled[C]:
    """The config that was typed, or what is wrong with it, beside the input that it is about."""
    try:
        return Filled(model.model_validate(_nested(model, values)), {})
    except ValidationError as error:
        errors: dict[str, str] = {}
        for one in error.errors():
            what = one["msg"].removeprefix("Value error, ")
            sentence = "This is needed." if one["type"] == "missing" else f"{what}."
            for name in _named(model, values, one["loc"], what):
                errors.setdefault(name, sentence)
        return Filled(None, errors)


def refused(model: type[Config], values: Mapping[str, str], error: HeadscopeError) -> dict[str, str]:
    """What the queue said of a config, beside the input that it is about."""
    names = [one.name for one in _inputs(model, values, {}, {}) if one.name.rpartition(".")[2] == error.field]
    return {name: str(error) for name in names[:1]} or {"": str(error)}


def _named(model: type[Config], values: Mapping[str, str], loc: tuple[int | str, ...], what: str) -> list[str]:
    """The inputs that a complaint is about: by its place, else those that its sentence names."""
    names = [one.name for one in _inputs(model, values, {}, {})]
    while loc:
        path = ".".join(map(str, loc))
        if inside := [name for name in names if name == path or name.startswith(f"{path}.")]:
            return inside[:1]  # of a config that is missing as a whole, its first
        loc = loc[:-1]
    return [""] + [name for name in names if re.search(rf"(?<![\w/]){name.rpartition('.')[2]}(?!\w)", what)]


def _nested(model: type[Config], values: Mapping[str, str], path: str = "") -> dict[str, Any]:
    """What was typed, as the model takes it; an input left empty keeps the default."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        at = f"{path}.{name}" if path else name
        inner = config_in(info.annotation)
        if inner is not None and _many(info):
            if places := _places(values, at):
                found[name] = tuple(_nested(inner, values, f"{at}.{place}") for place in sorted(places))
        elif inner is not None:
            if any(key.startswith(f"{at}.") for key in values):
                found[name] = _nested(inner, values, at)
        elif (text := values.get(at, "")).strip():
            found[name] = read(info, text.strip())
    return found


def _info(model: type[Config], path: str) -> FieldInfo | None:
    info: FieldInfo | None = None
    inner: type[Config] | None = model
    for part in path.split(".") if path else ():
        if part.isdigit():
            continue
        info = inner.model_fields.get(part) if inner else None
        inner = config_in(info.annotation) if info else None
    return info
