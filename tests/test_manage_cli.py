"""SAEs and harvests described, renamed, archived, deleted and looked for from the command line."""

import pytest
from typer.testing import CliRunner, Result

from sae_core.errors import HeadscopeError, NotFound, Renamed, UsageError
from server import cli, jobs
from server.commands import printing
from server.db import Database
from server.settings import Settings
from server.store import labels
from server.store.manage import harvest_line, sae_lines
from server.store.saes import find_sae
from tests.web.conftest import put
from tests.web.factory import Shape

NAME = "smollm2-l17"


@pytest.fixture
def filled(settings: Settings) -> Settings:
    put(settings, Shape(n_features=6, n_dead=1, running_job=False))
    database = Database(settings.url)
    jobs.upgrade(settings, database)
    with database.write() as session:
        labels.add_label(session, find_sae(session, NAME).id, 3, "dates after 'on'", "Maren")
    database.close()
    return settings


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that are not cut, whatever the terminal was when the command line was imported."""
    monkeypatch.setattr(printing.console(), "_width", 200)


def said(settings: Settings, *words: str) -> str:
    """What a command prints; its refusal is raised."""
    result: Result = CliRunner().invoke(cli.app, [*words, "--data", str(settings.data)])
    if isinstance(result.exception, HeadscopeError):
        raise result.exception
    assert result.exception is None, result.exception
    return " ".join(result.stdout.split())


def test_an_sae_is_renamed_described_archived_and_deleted(filled: Settings) -> None:
    assert "smollm2-135m 17 batchtopk 6 1" in said(filled, "saes", "list")
    assert "is called l17 now" in said(filled, "saes", "describe", NAME, "--name", "l17", "--description", "the best")
    assert "is described" in said(filled, "saes", "describe", "l17", "--description", "the very best")
    assert "is archived" in said(filled, "saes", "archive", "l17")
    assert "archived the very best" in said(filled, "saes", "list")
    assert "is brought back" in said(filled, "saes", "archive", "l17", "--undo")
    with pytest.raises(UsageError, match=r"all there is of it \(harvests: 1, labels: 1\); add --yes"):
        said(filled, "saes", "delete", "l17")
    with pytest.raises(Renamed):
        said(filled, "saes", "archive", NAME)
    assert "is deleted" in said(filled, "saes", "delete", "l17", "--yes")
    assert "There is no SAE" in said(filled, "saes", "list")
    with pytest.raises(NotFound):
        said(filled, "saes", "archive", "l17")


def test_what_is_not_given_stays(filled: Settings) -> None:
    said(filled, "harvests", "describe", "1", "--name", "all", "--description", "every row")
    said(filled, "harvests", "describe", "1", "--name", "whole")
    said(filled, "harvests", "archive", "1")
    database = Database(filled.url)
    with database.read() as session:
        line = harvest_line(session, 1)
        assert (line.name, line.description, line.archived_at is None) == ("whole", "every row", False)
        assert sae_lines(session)[0].description is None
    database.close()
    assert "1 smollm2-l17 published" in said(filled, "harvests", "list")


def test_everything_is_looked_for(filled: Settings) -> None:
    assert "smollm2-l17 can be searched." in said(filled, "db", "search")
    assert "label smollm2-l17 3 dates after 'on'" in said(filled, "db", "search", "DATES")
    assert "SAE smollm2-l17 layer 17 of smollm2-135m" in said(filled, "db", "search", "l17")
    assert "3 dates after 'on'" in said(filled, "db", "search", "dates", "--sae", NAME)
    assert "tide" in said(filled, "db", "search", "tide", "--sae", NAME, "--by", "token")
    assert "Nothing here is 'zzz'." in said(filled, "db", "search", "zzz")
    with pytest.raises(UsageError, match="no search by 'shape'"):
        said(filled, "db", "search", "x", "--sae", NAME, "--by", "shape")
