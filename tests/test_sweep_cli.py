"""`headscope sweep` and `headscope train --layers`, as a user meets them: what they print, what they refuse."""

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae_core.errors import UsageError
from server.cli import app
from tests.processes import Said
from tests.test_cli import environment, headscope, model, nothing_registered, text

__all__ = ["environment", "headscope", "model", "text"]  # fixtures

SMALL = ["--context", "32", "--tokens", "8192", "--heldout-tokens", "1024", "--expansion", "2", "--k", "8", "--batch", "256"]


def names(environment: dict[str, str], query: str = "select name from sae order by run") -> list[str]:
    with closing(sqlite3.connect(Path(environment["HEADSCOPE_DATA"]) / "headscope.db")) as connection:
        return [row[0] for row in connection.execute(query)]


def test_a_sweep_without_a_worker_runs_here_and_prints_its_table(
    headscope: Callable[..., Said], environment: dict[str, str], model: Path, text: Path
) -> None:
    said = headscope(
        "sweep", "--model", model, "--corpus", text, "--name", "s", "--layer", "1", "--archs", "relu,topk", "--ks", "4,8",
        "--l1", "2", *SMALL,
    )  # fmt: skip
    assert said.returncode == 0, said
    assert names(environment) == ["s-relu-k4", "s-relu-k8", "s-topk-k4", "s-topk-k8"]
    assert "4 SAEs, which take about" in said.stdout
    assert "sweep-s-1 is done." in said.stdout
    table = said.stdout.split("sweep-s-1 is done.")[1]
    assert table.split()[:2] == ["SAE", "L0"]
    rows = re.findall(r"^(\S+) +(\S+) +(\S+%) ", table, re.M)
    assert [row[0] for row in rows] == ["relu-k4", "relu-k8", "topk-k4", "topk-k8"]
    assert [float(row[1]) for row in rows[2:]] == pytest.approx([4, 8], abs=0.1)
    assert "withheld" in table or re.search(r"% \(-?\d+% to ", table)
    read = "select json_extract(config, '$.train.l1') from sae order by run"
    assert names(environment, read) == [2.0, 2.0, None, None], "what only relu reads reaches relu alone"
    assert names(environment, "select id from job where kind = 'harvest'") == []


def test_layers_of_train_are_fed_by_one_pass_and_each_is_harvested(
    headscope: Callable[..., Said], environment: dict[str, str], model: Path, text: Path
) -> None:
    said = headscope(
        "train", "--model", model, "--corpus", text, "--name", "a", "--layers", "all", *SMALL,
        "--harvest-tokens", "2048", "--harvest-top-k", "2", "--harvest-per-band", "1",
    )  # fmt: skip
    assert said.returncode == 0, said
    assert names(environment) == ["a-l00", "a-l01", "a-l02", "a-l03"]
    assert names(environment, "select count(*) from sae where harvest_id is not null") == [4]
    assert names(environment, "select title from job where kind = 'sweep'") == ["Sweep a: 4 SAEs on tiny, all layers"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer", "1", "--layers", "0,1", "--ks", "4"], "give one of them"),
        (["--layer", "1"], "Say what to vary: --layers, --archs"),
        (["--layers", "0,x"], "--layers x: "),
        (["--layers", "every"], "--layers every: "),
        (["--layer", "1", "--ks", "8,8"], "ks lists a value twice"),
        (["--layer", "1", "--archs", "topk,lasso"], "--archs lasso: "),
        (["--layer", "1", "--archs", "topk,batchtopk", "--l1", "2"], "--l1 is read by relu and gated only"),
        (["--layer", "1", "--ks", "8", "--tokens", "100", "--batch", "256"], "fewer than one batch of 256"),
        (["--layer", "1", "--ks", "8,4096", "--expansion", "2"], "k = 4096 active features of 128"),
        (["--layers", "1,9"], "no layer 9"),
        (["--layer", "1", "--ks", "8", "--preset", "nobody"], "There is no preset nobody; there are kissane-gpt2-l0, "),
    ],
)
def test_contradictions_are_refused_and_nothing_is_written(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: Path, text: Path, arguments: list[str], said: str
) -> None:
    for name in ("HEADSCOPE_DATA", "HEADSCOPE_CACHE", "HEADSCOPE_DEVICE"):
        monkeypatch.setenv(name, environment[name])
    done = CliRunner().invoke(app, ["sweep", "--model", str(model), "--corpus", str(text), *arguments])
    assert isinstance(done.exception, UsageError), done
    assert said in str(done.exception)
    assert nothing_registered(environment)


@pytest.mark.parametrize("arguments", [["--layers", "1,9"], ["--layer", "1", "--ks", "8,4096", "--expansion", "2"]])
def test_what_a_models_config_tells_is_refused_before_its_weights_are_read(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: Path, text: Path, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.setenv("HEADSCOPE_DATA", environment["HEADSCOPE_DATA"])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    done = CliRunner().invoke(app, ["sweep", "--model", str(bare), "--corpus", str(text), *arguments])
    assert isinstance(done.exception, UsageError), done
    assert re.search("no layer 9|k = 4096 active features of 128", str(done.exception))


def test_a_preset_is_where_to_begin_and_what_is_given_beside_it_wins(
    headscope: Callable[..., Said], environment: dict[str, str], model: Path, text: Path
) -> None:
    """Published settings on another model and text, for another architecture, which does not read their L1."""
    said = headscope(
        "train", "--preset", "kissane-gpt2-l5", "--model", model, "--corpus", text, "--layer", "1", "--name", "p",
        "--arch", "topk", "--harvest-tokens", "0", "--model-dtype", "float32", "--pool-tokens", "4096", *SMALL,
    )  # fmt: skip
    assert said.returncode == 0, said
    read = "select json_extract(config, '$.train.{}') from sae"
    found = {
        key: names(environment, read.format(key))[0] for key in ("arch", "beta2", "scaling", "l1", "lr", "batch", "schedule")
    }
    assert found == {
        "arch": "topk", "beta2": 0.99, "scaling": 0, "l1": None, "lr": 1.2e-3, "batch": 256, "schedule": "restarts",
    }  # fmt: skip
