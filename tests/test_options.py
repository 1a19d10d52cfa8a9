"""Options made from configs: switches, lists, choices, `none`, and sentences that name the option that was wrong."""

import inspect
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field, model_validator
from typer.testing import CliRunner

from sae_core.config import Config, HarvestConfig, RowsConfig, SweepConfig, TrainConfig
from sae_core.errors import UsageError
from server.commands.training import FLAGS
from server.options import built, given, options, takes

BASE: dict[str, Any] = {"model": "m", "corpus": "c", "site": {"layer": 1}}


class Kinds(Config):
    """A field of every kind."""

    number: Annotated[int, Field(ge=1)] = 3
    """A number."""
    switch: bool = True
    """A switch."""
    choice: Literal["left", "right"] = "left"
    """A choice."""
    limit: Annotated[float | None, Field(gt=1)] = 10.0
    """A number or none."""
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25, 0.5)
    """A list."""
    layers: tuple[int, ...] | Literal["all"] = ()
    """A list or a word."""
    name: str | None = None
    """A text or none."""

    @model_validator(mode="after")
    def _whole(self) -> "Kinds":
        if self.number == 13:
            raise ValueError("number and name do not go together")
        return self


def read(*arguments: str) -> Kinds:
    """What a command with these options makes of the arguments."""
    seen: list[Kinds] = []
    app = typer.Typer()

    @app.command()
    @takes(options(Kinds))
    def command(**values: Any) -> None:
        seen.append(built(Kinds, given(values, Kinds)))

    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not seen:
        raise done.exception
    return seen[0]


# ---- values ----


def test_what_is_not_given_stays_the_default() -> None:
    assert read() == Kinds()


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--number", "7"], "number", 7),
        (["--no-switch"], "switch", False),
        (["--switch"], "switch", True),
        (["--choice", "right"], "choice", "right"),
        (["--limit", "none"], "limit", None),
        (["--limit", "2.5"], "limit", 2.5),
        (["--shares", "0.03125,0.0625"], "shares", (0.03125, 0.0625)),
        (["--shares", "0.5"], "shares", (0.5,)),
        (["--shares", "0.1, 0.2,"], "shares", (0.1, 0.2)),
        (["--layers", "0,5,17"], "layers", (0, 5, 17)),
        (["--layers", "all"], "layers", "all"),
        (["--name", "x,y"], "name", "x,y"),
        (["--name", "none"], "name", None),
    ],
)
def test_every_kind_of_value_can_be_said(arguments: list[str], field: str, value: object) -> None:
    assert getattr(read(*arguments), field) == value


def test_both_sides_of_a_switch_are_said_where_the_default_is_on() -> None:
    assert built(TrainConfig, BASE | given({"scaling": False, "exclude_start": None}, TrainConfig)).scaling is False
    declared = options(TrainConfig)["exclude_start"].annotation.__metadata__[0]
    assert (declared.default, declared.param_decls) in (
        ("--exclude-start/--no-exclude-start", ()),
        (..., ("--exclude-start/--no-exclude-start",)),
    )


def test_the_help_shows_what_may_be_typed_and_what_stands_there_otherwise() -> None:
    shown = {name: parameter.annotation.__metadata__[0] for name, parameter in options(Kinds).items()}
    assert {name: option.metavar for name, option in shown.items()} == {
        "number": None, "switch": None, "choice": "left|right", "limit": "<float>|none", "shares": "<float>,...",
        "layers": "<int>,...|all", "name": "<str>|none",
    }  # fmt: skip
    assert [option.show_default for option in shown.values()] == ["3", "on", "left", "10", "0.25,0.5", "none", "none"]


@pytest.mark.parametrize("model", [TrainConfig, RowsConfig, HarvestConfig, SweepConfig])
def test_each_default_can_be_typed_and_gives_itself(model: type[Config]) -> None:
    for name, parameter in options(model, skip=("each",)).items():
        option, default = parameter.annotation.__metadata__[0], model.model_fields[name].default
        if model.model_fields[name].is_required() or isinstance(default, bool) or default == ():
            continue
        base = BASE if model is TrainConfig else {}
        typed: Any = option.show_default
        kind = inspect.get_annotations(type("x", (), {"__annotations__": {"v": parameter.annotation}}))["v"].__args__[0]
        if kind in (int | None, float | None):
            typed = float(typed)
        assert getattr(built(model, base | given({name: typed}, model)), name) == default, name


# ---- sentences ----


def refused(model: type[Config], values: dict[str, Any]) -> UsageError:
    with pytest.raises(UsageError) as error:
        built(model, values, FLAGS)
    return error.value


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"k": 0}, "k"),
        ({"aux_k": -1}, "aux-k"),
        ({"rows": {"tokens": 0}}, "tokens"),
        ({"rows": {"seed": "x"}}, "rows-seed"),
        ({"site": {"layer": -1}}, "layer"),
        ({"harvests": [{"top_k": 0}]}, "harvest-top-k"),
        ({"groups": ("0.5", "x")}, "groups"),
        ({"sink_norm": "wide"}, "sink-norm"),
        ({"sink_norm": 0.5}, "sink-norm"),
        ({"arch": "lasso"}, "arch"),
        ({"cache": "../up"}, "cache"),
    ],
)
def test_a_wrong_value_is_named_by_its_option(values: dict[str, Any], option: str) -> None:
    error = refused(TrainConfig, BASE | values)
    assert str(error).startswith(f"--{option} ")
    assert error.field == option


@pytest.mark.parametrize(
    ("values", "said", "named"),
    [
        ({"rows": {"tokens": 100}}, "100 tokens are fewer than one batch of 2048", "(--tokens, --batch)."),
        ({"warmup": 0.8, "decay": 0.8}, "cover more than the whole run", "(--warmup, --decay)."),
        ({"groups": (0.5, 0.6)}, "groups cover all features", "(--groups)."),
        ({"arch": "topk", "l1": 3.0}, "l1 is read by relu and gated only, and arch is topk", "(--l1, --arch)."),
    ],
)
def test_settings_that_contradict_each_other_are_named_by_their_options(values: dict[str, Any], said: str, named: str) -> None:
    error = refused(TrainConfig, BASE | values)
    assert said in str(error)
    assert str(error).endswith(named)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ks": ("16", "x")}, "--ks x: "),
        ({"layers": ("a",)}, "--layers a: "),
        ({"archs": ("lasso",)}, "--archs lasso: "),
        ({"expansions": (0,)}, "--expansions 0: "),
        ({"ks": (16, 16)}, "ks lists a value twice; each run must differ from the others (--ks)."),
        ({"archs": ("relu",), "each": {"relu": {"aux_k": 5}}}, "(--aux-k, --arch)."),
        ({"archs": ("relu",), "each": {"relu": {"l1": -1}}}, "--l1 -1: "),
    ],
)
def test_a_sweep_names_what_is_wrong_in_any_of_its_runs(values: dict[str, Any], said: str) -> None:
    assert said in str(refused(SweepConfig, {"base": TrainConfig.model_validate(BASE)} | values))


def test_a_field_that_does_not_exist_is_named() -> None:
    assert str(refused(TrainConfig, BASE | {"nix": 3})).startswith("--nix 3: ")
