"""Logging in by another service: a real one of the tests' own, which checks PKCE itself, and every way in which it may lie."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient

from sae_core.errors import UsageError
from server import access
from server.app import create_app
from server.oidc import BACK, COOKIE, LASTS
from server.settings import Settings
from server.store import accounts
from tests.web.conftest import database_of
from tests.web.provider import CLIENT, SECRET, Provider, listening

URL = "http://127.0.0.1:8000"


@pytest.fixture
def provider() -> Iterator[Provider]:
    with listening() as found:
        yield found


@pytest.fixture
def lab(settings: Settings, provider: Provider) -> Settings:
    """A lab with an admin, that knows the provider."""
    secret = settings.data / "oidc.secret"
    secret.write_text(SECRET)
    with database_of(settings) as db:
        db.upgrade()
        with db.write() as session:
            access.add_account(session, "Ada", "admin", "a long enough one")
    return Settings(
        data=settings.data, cache=settings.cache, accounts=True, oidc_issuer=provider.address, oidc_client_id=CLIENT,
        oidc_client_secret_file=secret,
    )  # fmt: skip


@contextmanager
def browser(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url=URL, follow_redirects=False) as client:
        yield client


def way(client: TestClient, back: str = "/jobs") -> str:
    """Begin a login, let the service answer; the address that it sends the browser back to."""
    begun = client.get("/login/oidc", params={"back": back})
    assert begun.status_code == 303
    answer = httpx.get(begun.headers["location"], trust_env=False)
    assert answer.status_code == 302, answer.text
    there = answer.headers["location"]
    assert there.startswith(URL + BACK)
    return there.removeprefix(URL)


def names(settings: Settings) -> dict[str, str]:
    with database_of(settings) as db, db.read() as session:
        return {one.name: one.role for one in accounts.people(session)}


def changed(settings: Settings, **values: Any) -> Settings:
    return settings.model_copy(update=values)


def test_somebody_new_gets_the_role_of_the_settings_and_is_known_again(lab: Settings, provider: Provider) -> None:
    for _ in range(2):
        with browser(changed(lab, oidc_new="reader")) as client:
            answer = client.get(way(client))
            assert (answer.status_code, answer.headers["location"]) == (303, "/jobs")
            assert "HttpOnly" in answer.headers["set-cookie"]
            assert client.get("/keys.json").json()["name"] == "Nina"
        provider.who["name"] = "Nina B."  # known by issuer and subject, whatever they are called there
    assert names(lab) == {"Ada": "admin", "Nina": "reader"}
    with database_of(lab) as db, db.read() as session:
        assert [one.action for one in accounts.audit_page(session).changes if one.action == "log in"] == ["log in"] * 2


def test_without_an_account_nobody_comes_in_where_nobody_new_may(lab: Settings) -> None:
    with browser(lab) as client:
        answer = client.get(way(client))
        assert answer.status_code == 401
        assert "no account for you" in answer.text
        assert client.get("/keys").headers["location"].startswith("/login")
    assert names(lab) == {"Ada": "admin"}


def test_a_name_that_is_taken_gets_a_number(lab: Settings, provider: Provider) -> None:
    provider.who |= {"name": "ada"}
    with browser(changed(lab, oidc_new="reader")) as client:
        assert client.get(way(client)).status_code == 303
    assert names(lab) == {"Ada": "admin", "ada 2": "reader"}


@pytest.mark.parametrize(("verified", "status"), [(True, 303), (False, 401), ("true", 401), (None, 401)])
def test_only_a_verified_address_leads_to_an_account_that_is_there(
    lab: Settings, provider: Provider, verified: object, status: int
) -> None:
    with database_of(lab) as db, db.write() as session:
        access.add_account(session, "Nina@lab.example", "editor", "a long enough one")
    provider.who |= {"email_verified": verified}
    with browser(lab) as client:
        assert client.get(way(client)).status_code == status
    if status == 303:
        provider.who |= {"sub": "somebody else"}  # with the same address, later
        with browser(lab) as client:
            assert client.get(way(client)).status_code == 401


def test_what_the_token_leaves_out_is_asked_for(lab: Settings, provider: Provider) -> None:
    provider.thin = True
    with browser(changed(lab, oidc_new="reader")) as client:
        assert client.get(way(client)).status_code == 303
    assert "Nina" in names(lab)


def test_a_claim_gives_the_role_anew_at_every_login_but_the_last_admin_stays(lab: Settings, provider: Provider) -> None:
    told = changed(lab, oidc_role_claim="groups")
    for groups, role in ((["staff", "reader", "editor"], "editor"), (["admin"], "admin"), ("reader", "reader")):
        provider.who["groups"] = groups
        with browser(told) as client:
            assert client.get(way(client)).status_code == 303
        assert names(lab)["Nina"] == role
    provider.who["groups"] = ["staff"]
    with browser(told) as client:
        assert client.get(way(client)).status_code == 401
    provider.who["groups"] = ["admin"]
    with browser(told) as client:
        client.get(way(client))
    with database_of(lab) as db, db.write() as session:
        accounts.set_role(session, "Ada", "reader")
    provider.who["groups"] = ["reader"]
    with browser(told) as client:
        assert client.get(way(client)).status_code == 303
    assert names(lab)["Nina"] == "admin"


def test_who_is_kept_out_stays_out(lab: Settings) -> None:
    told = changed(lab, oidc_new="reader")
    with browser(told) as client:
        assert client.get(way(client)).status_code == 303
        with database_of(lab) as db, db.write() as session:
            accounts.disable(session, "Nina", True)
        assert client.get(way(client)).status_code == 401


LIES = {
    "another nonce": {"nonce": "of another login"},
    "another audience": {"aud": "another program"},
    "several audiences and another party": {"aud": [CLIENT, "other"], "azp": "other"},
    "another issuer": {"iss": "https://elsewhere.example"},
    "run out": {"exp": int(time.time()) - 3600},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_token_that_is_not_for_this_login_is_not_believed(lab: Settings, provider: Provider, lie: str) -> None:
    provider.lies = LIES[lie]
    with browser(changed(lab, oidc_new="reader")) as client:
        assert client.get(way(client)).status_code == 401
    assert names(lab) == {"Ada": "admin"}


@pytest.mark.parametrize("forged", ["key", "secret"])
def test_a_forged_signature_is_not_believed(lab: Settings, provider: Provider, forged: str) -> None:
    provider.forged = forged
    with browser(changed(lab, oidc_new="reader")) as client:
        assert client.get(way(client)).status_code == 401
    assert names(lab) == {"Ada": "admin"}


def test_a_login_that_this_browser_did_not_begin_is_refused(lab: Settings, provider: Provider) -> None:
    told = changed(lab, oidc_new="reader")
    with browser(told) as mine, browser(told) as theirs:
        there = way(theirs)  # an attacker's own, sent to somebody
        assert mine.get(there).status_code == 401  # who has begun none
        way(mine)
        assert mine.get(there).status_code == 401  # or another one
        assert provider.codes  # and the code was not even shown to the service
        assert theirs.get(there).status_code == 303
        assert theirs.get(there).status_code == 401  # a way back leads back once


def test_a_code_of_another_login_does_not_fit_its_verifier(lab: Settings) -> None:
    told = changed(lab, oidc_new="reader")
    with browser(told) as mine, browser(told) as theirs:
        stolen = parse_qs(urlsplit(way(theirs)).query)["code"][0]
        state = parse_qs(urlsplit(way(mine)).query)["state"][0]
        assert mine.get(BACK, params={"code": stolen, "state": state}).status_code == 401


def test_a_cookie_that_was_changed_or_is_too_old_is_none(lab: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    told = changed(lab, oidc_new="reader")
    with browser(told) as client:
        there = way(client)
        kept = client.cookies[COOKIE].strip('"')
        client.cookies.clear()
        client.cookies.set(COOKIE, "A" + kept[1:])
        assert client.get(there).status_code == 401
        client.cookies.clear()
        later = time.time() + LASTS + 1
        monkeypatch.setattr("server.oidc.time.time", lambda: later)
        client.cookies.set(COOKIE, kept)
        assert client.get(there).status_code == 401


def test_a_refusal_is_said_and_nothing_that_was_typed_into_the_address_is_shown(lab: Settings, provider: Provider) -> None:
    provider.refuses = True
    with browser(lab) as client:
        there = way(client)
        answer = client.get(there)
        assert answer.status_code == 401
        assert "access_denied" in answer.text
        there = way(client).replace("access_denied", "%3Cb%3Eevil%3C%2Fb%3E")
        assert "evil" not in client.get(there).text


def test_nobody_is_led_to_another_site_after_logging_in(lab: Settings) -> None:
    with browser(changed(lab, oidc_new="reader")) as client:
        assert client.get(way(client, "https://evil.example/")).headers["location"] == "/"


def test_a_service_that_is_away_is_a_sentence(lab: Settings) -> None:
    with browser(changed(lab, oidc_issuer="http://127.0.0.1:9")) as client:
        answer = client.get("/login/oidc")
        assert answer.status_code == 503
        assert "does not answer" in answer.text
        assert client.get("/login").status_code == 200


def test_it_is_off_unless_asked_for_and_only_over_https(lab: Settings) -> None:
    with browser(changed(lab, oidc_issuer=None)) as client:
        assert client.get("/login/oidc").status_code == 404
        assert "/login/oidc" not in client.get("/login").text
    for wrong in (
        {"oidc_issuer": "http://login.example"},
        {"oidc_issuer": "https://x.example?y"},
        {"accounts": False},
        {"oidc_client_id": ""},
    ):
        with pytest.raises(UsageError, match="HEADSCOPE_OIDC_ISSUER"):
            Settings(**({"accounts": True, "oidc_issuer": "https://login.example", "oidc_client_id": "x"} | wrong))
