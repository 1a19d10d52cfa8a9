"""Web forms made from config models: one input per field, helped by the field's own description. No torch.

What was typed stays text until the model reads it, so a refusal can stand beside its input with nothing lost. An input is
named by its field's path: `rows.context`, `harvests.0.tokens`; of a list of configs an input holds how many they are.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sae_core.config import Config
from sae_core.errors import HeadscopeError
from server.fields import NONE, choices, config_in, configs_in, joined_texts, read, verbatim, written

C = TypeVar("C", bound=Config)
Kind = Literal["number", "text", "choice", "count"]
MOST = 20
"""Configs in one list."""


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
        name, _, place = self.name.rpartition(".")
        if not place.isdigit():
            return self.name.replace(".", " ") or "everything else"
        one = f"{name.removesuffix('ies')}y" if name.endswith("ies") else name.removesuffix("s")
        return (one if place == "0" else f"{one} {int(place) + 1}").replace(".", " ")

    @property
    def open(self) -> bool:
        """Shown open at once: what is needed, what is wrong and what was changed must be seen."""
        return self.first or self.needed or any(one.error or one.changed for one in self.inputs)

    @property
    def needed(self) -> bool:
        """Whether something must be set in it."""
        return any(one.required for one in self.inputs)


class Filled(NamedTuple, Generic[C]):
    """A form that was sent: the config, or what is wrong with it by input; `` holds what is about the whole."""

    config: C | None
    errors: dict[str, str]


def typed(model: type[Config], config: Mapping[str, Any]) -> dict[str, str]:
    """A stored config, whole or in part, as one would type it, by input."""
    return dict(_typed([model], config, ""))


def _typed(arms: Sequence[type[Config]], config: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    fields = {name: info for arm in arms for name, info in arm.model_fields.items()}
    for name, value in config.items():
        at = f"{path}.{name}" if path else name
        info = fields.get(name)
        if info is None:
            continue
        inner = configs_in(info.annotation)
        if inner and _many(info):
            yield at, str(len(value))
            for place, one in enumerate(value):
                yield from _typed(inner, one, f"{at}.{place}")
        elif inner:
            yield from _typed(inner, value, at)
        else:
            yield at, _shown(info, value)


def exactly(value: Any) -> str:
    """A value as text that reads back as the very same."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple):
        return ",".join(map(exactly, value))
    return json.dumps(value) if isinstance(value, Mapping) else written(value)


def _shown(info: FieldInfo, value: Any) -> str:
    """A field's value as it stands in its input."""
    return joined_texts(value) if verbatim(info) and isinstance(value, list | tuple) else exactly(value)


def groups(
    model: type[Config],
    values: Mapping[str, str],
    errors: Mapping[str, str],
    *,
    first: Iterable[str],
    known: Mapping[str, Iterable[str]],
    usual: Mapping[str, str],
) -> list[Group]:
    """The form's groups: `first` in front, then each config's own fields. `known` has what can stand in a field, `usual` what
    stands there instead of the default."""
    found = _inputs([model], {**usual, **values}, errors, known)
    every = {one.name: one._replace(default=usual.get(one.name, one.default)) for one in found}
    front = tuple(every.pop(name) for name in first if name in every)
    begin = [Group("", "", front, True)]
    rest: dict[str, list[Input]] = {}
    for one in every.values():
        rest.setdefault(one.name.rpartition(".")[0], []).append(one)
    others = [Group(name, _words(model, name), tuple(inputs), False) for name, inputs in sorted(rest.items())]
    return begin + sorted(others, key=lambda group: not group.needed)


def _words(model: type[Config], path: str) -> str:
    """What a group is about: the description of the field that holds it."""
    info = _info(model, path)
    return "" if info is None else info.description or ""


def _inputs(
    arms: Sequence[type[Config]],
    values: Mapping[str, str],
    errors: Mapping[str, str],
    known: Mapping[str, Iterable[str]],
    path: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[Input]:
    """The inputs of a config; where configs of several kinds can stand, those of all of them, with a choice of the kind.
    What has one word to choose from is no input."""
    found: dict[str, Input] = {}
    needed = Counter[str]()
    for arm in arms:
        for one in _inputs_of(arm, values, errors, known, path, defaults):
            there = found.get(one.name, one)
            found[one.name] = there._replace(options=tuple(dict.fromkeys((*there.options, *one.options))))
            needed[one.name] += one.required
    told_apart = {f"{path}.{name}" for arm in arms[1:] for name, _ in _constants(arm)}
    for one in found.values():
        if one.kind != "choice" or one.required or len(one.options) > 1:
            yield one._replace(required=needed[one.name] == len(arms) or one.name in told_apart)


def _inputs_of(
    model: type[Config],
    values: Mapping[str, str],
    errors: Mapping[str, str],
    known: Mapping[str, Iterable[str]],
    path: str,
    defaults: Mapping[str, Any] | None,
) -> Iterator[Input]:
    for name, info in model.model_fields.items():
        at = f"{path}.{name}" if path else name
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        default = defaults.get(name, default) if defaults is not None else default
        inner = configs_in(info.annotation)
        if not inner:
            yield _input(at, info, default, values, errors, known)
        elif _many(info):
            stored = default if isinstance(default, tuple) else ()
            usual = max(len(stored), int(info.is_required()))
            n = _count(values, at, usual)
            about = f"How many: {info.description or ''}"
            yield Input(
                at, _label(at), about, "count", values.get(at, str(n)), str(usual), (), False, errors.get(at, "")
            )  # fmt: skip
            for place in range(n):
                base = stored[place].model_dump() if place < len(stored) else None
                yield from _inputs(inner, values, errors, known, f"{at}.{place}", base)
        else:
            yield from _inputs(inner, values, errors, known, at, default.model_dump() if default is not None else None)


def _many(info: FieldInfo) -> bool:
    """Whether the field holds a list of configs."""
    return any(get_origin(choice) is tuple for choice in choices(info.annotation))


def _count(values: Mapping[str, str], path: str, usual: int) -> int:
    """How many configs a list is to hold: as many as was typed, else as there are inputs of, else as usual."""
    said = values.get(path, "").strip()
    if said.isascii() and said.isdigit():
        return min(int(said), MOST)
    places = [int(found[1]) for name in values if (found := re.match(rf"{re.escape(path)}\.(\d{{1,2}})\.", name))]
    return min(max(places) + 1, MOST) if places else usual


def _label(path: str) -> str:
    return path.rpartition(".")[2].replace("_", " ")


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
    registered = known.get(at.rpartition(".")[2])
    options = (("on", "off") if arms == [bool] else words) if registered is None else tuple(registered)
    only = arms == [bool] or all(get_origin(arm) is Literal for arm in arms) or (registered is not None and not _many(info))
    if registered is not None and type(None) in arms:
        options = (NONE, *options)
    kind: Kind = "choice" if only else "number" if set(arms) <= {int, float, type(None)} else "text"
    required = info.is_required()
    shown = "" if required else _shown(info, default)
    return Input(
        name=at,
        label=_label(at),
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
        return Filled(model.model_validate(_nested([model], values)), {})
    except ValidationError as error:
        errors: dict[str, str] = {}
        for loc, kind, what in _complaints(error):
            sentence = SAID.get(kind, f"{what}.")
            for name in _named(model, values, loc, what):
                errors.setdefault(name, sentence)
        return Filled(None, errors)


SAID = {"missing": "This is needed.", "extra_forbidden": "This is not read together with what else was chosen; leave it empty."}
"""Complaints of pydantic's in words of ours."""


def _complaints(error: ValidationError) -> Iterator[tuple[tuple[int | str, ...], str, str]]:
    """Place, kind and sentence of each; of a config that a config makes, the sentence names the place."""
    for one in error.errors():
        inner = one.get("ctx", {}).get("error")
        if isinstance(inner, ValidationError):
            for loc, kind, what in _complaints(inner):
                yield (), "" if loc else kind, f"{' '.join(map(str, loc))}: {what}" if loc else what
        else:
            yield one["loc"], one["type"], one["msg"].removeprefix("Value error, ")


def refused(model: type[Config], values: Mapping[str, str], error: HeadscopeError) -> dict[str, str]:
    """What the queue said of a config, beside the input that it is about."""
    names = [one.name for one in _inputs([model], values, {}, {}) if one.name.rpartition(".")[2] == error.field]
    return {name: str(error) for name in names[:1]} or {"": str(error)}


def _named(model: type[Config], values: Mapping[str, str], loc: tuple[int | str, ...], what: str) -> list[str]:
    """The inputs that a complaint is about: by its place, else those that its sentence names."""
    names = [one.name for one in _inputs([model], values, {}, {})]
    path, inside = "", names
    for part in loc:  # beside fields, a place holds the arms of unions
        further = f"{path}.{part}" if path else str(part)
        if found := [name for name in names if name == further or name.startswith(f"{further}.")]:
            path, inside = further, found
    if path in inside:
        return [path]
    mentioned = [name for name in inside if re.search(rf"(?<![\w/]){name.rpartition('.')[2]}(?!\w)", what)]
    return (mentioned or inside[:1]) if path else ["", *mentioned]


def _nested(arms: Sequence[type[Config]], values: Mapping[str, str], path: str = "") -> dict[str, Any]:
    """What was typed, as the model takes it; an input left empty keeps the default."""
    begins = f"{path}." if path else ""
    model = next(
        (arm for arm in arms if all(values.get(f"{begins}{name}", word) == word for name, word in _constants(arm))), arms[0]
    )
    found: dict[str, Any] = dict(_constants(model))
    for name, info in model.model_fields.items():
        at = f"{begins}{name}"
        inner = configs_in(info.annotation)
        if inner and _many(info):
            said = values.get(at, "").strip()
            if said and not (said.isascii() and said.isdigit()):
                found[name] = said  # for the model to refuse
            elif said or _count(values, at, 0):
                found[name] = tuple(_nested(inner, values, f"{at}.{place}") for place in range(_count(values, at, 0)))
        elif inner:
            if any(key.startswith(f"{at}.") for key in values):
                found[name] = _nested(inner, values, at)
        elif text := values.get(at, "") if verbatim(info) else values.get(at, "").strip():
            found[name] = read(info, text)
    for name, info in ((name, info) for arm in arms for name, info in arm.model_fields.items() if name not in model.model_fields):
        text = values.get(f"{begins}{name}", "").strip()
        if text and (info.is_required() or text != _shown(info, info.get_default())):
            found[name] = text  # of another kind: for the model to refuse
    return found


def _constants(model: type[Config]) -> list[tuple[str, str]]:
    """Fields of one word, by which configs that may stand in one place are told apart."""
    words = [
        (name, get_args(info.annotation)) for name, info in model.model_fields.items() if get_origin(info.annotation) is Literal
    ]
    return [(name, only[0]) for name, only in words if len(only) == 1]


def _info(model: type[Config], path: str) -> FieldInfo | None:
    info: FieldInfo | None = None
    inner: type[Config] | None = model
    for part in path.split(".") if path else ():
        if part.isdigit():
            continue
        info = inner.model_fields.get(part) if inner else None
        inner = config_in(info.annotation) if info else None
    return info
