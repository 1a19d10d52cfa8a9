"""Settings that follow from others, secrets out of files, and a database that is waited for."""

import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from sae_core.errors import DatabaseAway, DatabaseTooOld, UsageError
from server import db as databases
from server.db import Database
from server.settings import Settings


def test_the_password_comes_out_of_a_file_and_is_not_shown(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("p@ss/word\n")
    settings = Settings(data=tmp_path, database_url="postgresql+psycopg://hs@db/headscope", database_password_file=secret)
    assert settings.url.password == "p@ss/word"  # pragma: allowlist secret
    assert "p@ss" not in repr(settings.url)
    assert sa.make_url(settings.jobs_url).password == "p@ss/word"  # pragma: allowlist secret


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_secret_that_is_missing_or_empty_is_said(tmp_path: Path, content: str | None) -> None:
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_text(content)
    with pytest.raises(UsageError, match="HEADSCOPE_ENGINE_SECRET_FILE"):
        _ = Settings(data=tmp_path, engine_secret_file=secret).secret


def test_the_engines_secret_comes_out_of_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("shared\n")
    assert Settings(data=tmp_path, engine_secret_file=secret).secret == "shared"  # pragma: allowlist secret
    assert not (tmp_path / "engine.secret").exists()


@pytest.mark.parametrize(
    ("public", "address", "prefix"),
    [
        (None, "http://127.0.0.1:8000", ""),
        ("https://lab.example", "https://lab.example", ""),
        ("https://lab.example/headscope/", "https://lab.example/headscope", "/headscope"),
        ("http://lab.example:8080/a/b", "http://lab.example:8080/a/b", "/a/b"),
    ],
)
def test_the_public_address_gives_prefix_and_host(public: str | None, address: str, prefix: str) -> None:
    settings = Settings(public_url=public, hosts="web, other")
    assert (settings.address, settings.prefix) == (address, prefix)
    assert {"web", "other", "127.0.0.1"} <= set(settings.trusted_hosts)
    assert ("lab.example" in settings.trusted_hosts) == (public is not None)


@pytest.mark.parametrize("public", ["lab.example", "ftp://lab.example", "https://", "https://lab.example/?x=1", "https://lab/#a"])
def test_a_public_address_that_is_none_is_refused(public: str) -> None:
    with pytest.raises(UsageError, match="public address"):
        Settings(public_url=public)


def test_a_database_that_comes_up_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "WAIT_SECONDS", 0.01)
    database, said = Database(sa.make_url("postgresql+psycopg://hs@nowhere/headscope")), list[str]()
    looks = iter([DatabaseAway("It is away."), DatabaseAway("It is away."), DatabaseTooOld("It is old."), None])

    def look() -> None:
        if error := next(looks):
            raise error

    monkeypatch.setattr(database, "check_version", look)
    database.wait(60, said.append)
    assert [line.split(" Waiting")[0] for line in said] == ["It is away.", "It is old."]


def test_waiting_ends_with_the_sentence_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "WAIT_SECONDS", 0.01)
    url = sa.make_url("postgresql+psycopg://hs@127.0.0.1:1/headscope")
    began = time.monotonic()
    with pytest.raises(DatabaseAway, match="does not answer"):
        Database(url).wait(0.05, lambda _: None)
    assert time.monotonic() - began < 10


def test_one_who_upgrades_does_not_wait_for_the_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(sa.make_url("postgresql+psycopg://hs@nowhere/headscope"))

    def old() -> None:
        raise DatabaseTooOld("It is old.")

    monkeypatch.setattr(database, "check_version", old)
    database.wait(60, pytest.fail, current=False)


def test_a_file_is_not_waited_for(tmp_path: Path) -> None:
    database = Database(sa.make_url(f"sqlite:///{tmp_path / 'x.db'}"))
    with pytest.raises(DatabaseTooOld):
        database.wait(60, pytest.fail)
    database.close()
