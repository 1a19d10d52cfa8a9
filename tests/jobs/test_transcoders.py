"""`headscope import transcoder`, the list and the removal, on a tiny model; what a backup and a clean-up make of the files."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sae_core.errors import HeadscopeError
from sae_core.transcoders import load_transcoder
from server import cli
from server.keeping import backup, gc
from server.settings import Settings
from server.store import transcoders
from tests.jobs.conftest import Home

CASES = Path(__file__).resolve().parent.parent / "fixtures" / "transcoders"


def run(home: Home, *arguments: str) -> str:
    done = CliRunner().invoke(cli.app, [*arguments, "--data", str(home.settings.data)], env={"COLUMNS": "300"})
    if isinstance(done.exception, HeadscopeError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def files(home: Home) -> list[Path]:
    return sorted((home.settings.data / transcoders.HOME).glob("*"))


def test_one_is_imported_listed_replaced_and_deleted(home: Home) -> None:
    given = ("import", "transcoder", str(CASES / "saelens-jumprelu-skip"), "--model", "tiny")
    said = " ".join(run(home, *given).split())
    assert "Layer 1 of tiny has a transcoder of 24 features; it reads normed, writes stream." in said
    with home.db.read() as session:
        (record,) = transcoders.of_model(session, "tiny")
    assert record.config["format"] == "saelens"
    assert record.config["fvu"] > 0
    made = load_transcoder(home.settings.data / record.file)
    assert made.W_dec.equal(load_file(CASES / "saelens-jumprelu-skip" / "sae_weights.safetensors")["W_dec"])
    assert record.sha256[:12] in run(home, "transcoders", "list")
    with pytest.raises(HeadscopeError, match="Layer 1 of tiny has a transcoder already; --replace puts this one in its place"):
        run(home, *given)
    tracer = str(CASES / "circuit-tracer" / "layer_1.safetensors")
    said = run(home, "import", "transcoder", tracer, "--model", "tiny", "--replace", "--reads", "normed", "--writes", "mlp")
    assert "it reads normed, writes mlp" in " ".join(said.split())
    with home.db.read() as session:
        (other,) = transcoders.every(session)
    assert [path.name for path in files(home)] == [Path(other.file).name], "the old file is gone"
    with pytest.raises(HeadscopeError, match="add --yes"):
        run(home, "transcoders", "delete", "tiny", "1")
    run(home, "transcoders", "delete", "tiny", "1", "--yes")
    assert files(home) == []
    assert "No model has a transcoder" in run(home, "transcoders", "list")
    with pytest.raises(HeadscopeError, match="tiny has no transcoder of layer 1"):
        run(home, "transcoders", "delete", "tiny", "1", "--yes")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("saelens-plain", "--layer", "3"), "is one of layer 1, and layer 3 was asked for"),
        (("saelens-plain", "--reads", "all"), "reads"),
        (("../formats/saelens-topk",), "is an SAE and no transcoder"),
        (("nothing",), "no file or folder"),
        (("wide",), "reads 40 numbers a token, and the stream of tiny has 32"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(home: Home, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    place = CASES / arguments[0]
    if arguments[0] == "wide":
        place = shutil.copytree(CASES / "saelens-plain", tmp_path / "wide")
        tensors = load_file(place / "sae_weights.safetensors")
        wide = {"W_enc": tensors["W_enc"].new_zeros(40, 24), "W_dec": tensors["W_dec"].new_zeros(24, 40)}
        save_file(tensors | wide | {"b_dec": tensors["b_dec"].new_zeros(40)}, place / "sae_weights.safetensors")
    with pytest.raises(HeadscopeError, match=says):
        run(home, "import", "transcoder", str(place), "--model", "tiny", *arguments[1:])
    assert files(home) == []
    with home.db.read() as session:
        assert transcoders.every(session) == []


def test_a_backup_has_them_and_a_clean_up_takes_strays_only(home: Home, tmp_path: Path) -> None:
    run(home, "import", "transcoder", str(CASES / "saelens-skip"), "--model", "tiny")
    (kept,) = files(home)
    stray = kept.with_name("stray.safetensors")
    stray.write_bytes(b"x")
    assert gc.collect(home.settings, home.db, gc.find(home.settings, home.db)) == []
    os.utime(stray, (0, 0))
    os.utime(kept, (0, 0))
    gone = gc.collect(home.settings, home.db, gc.find(home.settings, home.db))
    assert [one.path for one in gone] == [stray]
    _, made = backup.backup(home.settings, tmp_path / "backups")
    assert made.notes == []
    assert f"{transcoders.HOME}/{kept.name}" in made.files
    empty = Settings(data=tmp_path / "other", cache=home.settings.cache).prepare()
    backup.restore(empty, tmp_path / "backups")
    assert (empty.data / transcoders.HOME / kept.name).read_bytes() == kept.read_bytes()
    kept.write_bytes(b"other")
    _, made = backup.backup(home.settings, tmp_path / "backups")
    assert made.notes == ["The transcoder of layer 1 of tiny is not the file that was imported."]
