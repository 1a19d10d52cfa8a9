"""Coming in: start token, login, keys, roles, and the log of what was changed."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from pydantic import SecretStr

from sae_core.errors import TooOften, UsageError
from server.access import ensure_admin, new_key
from server.app import create_app
from server.db import Database
from server.limits import MOST, Limit
from server.live import InLine, Live
from server.passwords import hashed, is_right
from server.settings import Settings
from server.store import accounts
from server.store.accounts import audit_page
from server.tables import ApiKey, Login, Prompt
from tests.web.accounts import NAMES, PASSWORD, Lab, lab_app, settle, visitors
from tests.web.conftest import at, database_of

URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return settle(at(tmp_path_factory.mktemp("lab")))


@pytest.fixture(scope="module")
def people(lab: Lab) -> Iterator[dict[str, TestClient]]:
    with visitors(lab_app(lab.settings)) as found:
        yield found


def test_only_the_start_token_lets_a_browser_in_without_accounts(lab: Lab) -> None:
    settings = lab.settings.model_copy(update={"start_token": SecretStr("t0ken")})
    with TestClient(create_app(settings), base_url=URL, follow_redirects=False) as client:
        assert client.get("/").status_code == client.get("/index.json").status_code == 401
        assert client.get("/healthz").status_code == 200
        assert client.get("/start?token=wrong").status_code == 401
        answer = client.get("/start?token=t0ken")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert "SameSite=lax" in answer.headers["set-cookie"]
        assert client.get("/").status_code == 200
        client.cookies.clear()
        assert client.get("/api/v1/saes", headers={"Authorization": "Bearer t0ken"}).status_code == 200
        assert client.get("/api/v1/saes", headers={"Authorization": "Bearer other"}).status_code == 401


def test_the_token_is_kept_for_its_owner_alone(settings: Settings) -> None:
    token = settings.guarded().token
    assert token == settings.guarded().token
    assert (settings.data / "start.token").stat().st_mode & 0o077 == 0
    assert settings.guarded().entrance.endswith(f"/start?token={token}")
    assert settings.model_copy(update={"start_token": SecretStr("off")}).guarded().token is None


def test_it_listens_elsewhere_only_with_accounts() -> None:
    with pytest.raises(UsageError, match="Without accounts"):
        Settings(host="0.0.0.0")
    assert Settings(host="0.0.0.0", accounts=True).host == "0.0.0.0"


def test_the_first_admin_comes_from_a_file_once(settings: Settings) -> None:
    with database_of(settings) as db:
        db.upgrade()
        with pytest.raises(UsageError, match="HEADSCOPE_ADMIN_PASSWORD_FILE"):
            ensure_admin(settings.model_copy(update={"accounts": True}), db)
        path = settings.data / "password"
        path.write_text(f"{PASSWORD}\n")
        told = settings.model_copy(update={"accounts": True, "admin_password_file": path})
        for _ in range(2):
            ensure_admin(told, db)
        with db.read() as session:
            assert [(one.name, one.role) for one in accounts.people(session)] == [("admin", "admin")]
            kept = accounts.password_of(session, "ADMIN")
        assert kept is not None
        assert kept[2] != PASSWORD
        assert is_right(PASSWORD, kept[2])


def test_a_short_password_is_none() -> None:
    with pytest.raises(UsageError, match="10 to"):
        hashed("too short")
    assert not is_right("anything at all", None)


def test_a_wrong_password_says_no_more_than_a_wrong_name(lab: Lab) -> None:
    with TestClient(lab_app(lab.settings), base_url=URL, follow_redirects=False) as client:
        wrong = {"password": "a wrong one"}  # pragma: allowlist secret
        told = [client.post("/login", data={"name": name} | wrong) for name in ("Ola", "Nobody")]
        assert [one.status_code for one in told] == [401, 401]
        assert len({one.text.replace("Nobody", "Ola") for one in told}) == 1
        again = [client.post("/login", data={"name": "Ola"} | wrong).status_code for _ in range(11)]
        assert 429 in again


def test_a_browser_can_be_shut_out(lab: Lab) -> None:
    with visitors(lab_app(lab.settings)) as people:
        ines = people["Ines"]
        login = max(one["id"] for one in ines.get("/keys.json").json()["logins"])
        assert people["Rita"].post("/keys/logout", data={"login": login}).status_code == 404
        assert ines.get("/keys").status_code == 200
        assert ines.post("/keys/logout", data={"login": login}).status_code == 303
        assert ines.get("/keys").headers["location"].startswith("/login")
        assert people["Ola"].post("/logout").status_code == 303
        assert people["Ola"].get(f"/saes/{NAMES['private']}").status_code == 404


def test_a_key_does_what_its_scope_allows_and_no_more(lab: Lab, people: dict[str, TestClient]) -> None:
    with database_of(lab.settings) as db, db.write() as session:
        ola = accounts.account_id(session, "Ola")
        keys = {scope: new_key(session, ola, scope, scope, "1")[0] for scope in accounts.SCOPES}
        rita = new_key(session, accounts.account_id(session, "Rita"), "mine", "admin", "")[0]
    client = people["anonymous"]
    address = f"/api/v1/saes/{NAMES['private']}/features/3/star"

    def star(key: str) -> int:
        return client.put(address, headers={"x-api-key": key}).status_code

    assert [star(keys[scope]) for scope in ("read", "write", "admin")] == [403, 200, 200]
    assert star(rita) == 403
    assert star("headscope_unknown") == 401
    assert client.get("/people.json", headers={"Authorization": f"Bearer {keys['admin']}"}).status_code == 403
    assert client.post("/keys", data={"name": "x", "scope": "read"}, headers={"x-api-key": keys["write"]}).status_code == 401
    with database_of(lab.settings) as db, db.write() as session:
        kept = {one.name: one.id for one in accounts.keys(session, ola)}
        accounts.revoke_key(session, kept["write"])
    assert star(keys["write"]) == 401


def test_a_new_key_is_shown_once(people: dict[str, TestClient]) -> None:
    answer = people["Ines"].post("/keys", data={"name": "notebook", "scope": "read", "days": "9"})
    key = next(word for word in re.split(r"[<>\s]", answer.text) if word.startswith("headscope_"))
    assert people["anonymous"].get("/api/v1/saes", headers={"x-api-key": key}).status_code == 200
    assert key not in people["Ines"].get("/keys").text


def test_an_owner_says_who_sees_what(lab: Lab, people: dict[str, TestClient]) -> None:
    sae, listed = f"/saes/{NAMES['shared']}", f"/lists/{lab.lists['shared']}"
    for address in (sae, listed):
        assert people["Ines"].post(f"{address}/visibility", data={"visibility": "public"}).status_code == 403
        assert people["anonymous"].get(address).status_code == 404
        assert people["Ola"].post(f"{address}/visibility", data={"visibility": "public"}).status_code == 303
        assert people["anonymous"].get(address).status_code == 200
        assert people["Ada"].post(f"{address}/visibility", data={"visibility": "shared"}).status_code == 303
        assert people["anonymous"].get(address).status_code == 404


def test_what_is_written_is_signed_with_the_account_and_kept_in_the_log(lab: Lab, people: dict[str, TestClient]) -> None:
    address = f"/api/v1/saes/{NAMES['shared']}/features/4/labels"
    answer = people["Ines"].post(address, json={"text": "dates"}, headers={"X-Author": "Somebody else"})
    assert answer.json()["labels"][0]["author"] == "Ines"
    with database_of(lab.settings) as db, db.read() as session:
        newest = audit_page(session).changes[0]
    assert (newest.who, newest.way, newest.target) == ("Ines", "login", address)
    assert people["Ines"].get("/audit.json").status_code == 403
    assert people["Ada"].get("/audit.json").json()["changes"][0]["who"] == "Ines"


def test_the_last_admin_stays(people: dict[str, TestClient]) -> None:
    answer = people["Ada"].post("/people/role", data={"name": "Ada", "role": "reader"})
    assert answer.status_code == 422
    assert "only admin" in answer.text


def test_pages_tell_viewers_apart_in_their_tags(people: dict[str, TestClient]) -> None:
    address = f"/saes/{NAMES['public']}/features/3"
    tags = {people[name].get(address).headers["etag"] for name in ("Ola", "Ines", "Rita", "anonymous")}
    assert len(tags) == 4


def test_a_limit_slides_and_forgets_the_oldest() -> None:
    now = [0.0]
    limit = Limit(2, 10, clock=lambda: now[0])
    limit.take("a", "trying")
    now[0] = 6
    limit.take("a", "trying")
    with pytest.raises(TooOften) as caught:
        limit.take("a", "trying")
    assert caught.value.wait == 4
    limit.take("b", "trying")
    now[0] = 10.5
    limit.take("a", "trying")
    for asker in range(MOST):
        limit.take(str(asker), "trying")
    assert limit._database().execute("select count(*) from asked").fetchone() == (MOST,)
    limit.forget("9")
    for _ in range(2):
        limit.take("9", "trying")


def test_processes_that_are_forked_limit_together(tmp_path: Path) -> None:
    limit = Limit(50, 300, file=tmp_path / "limit.db")
    limit.take("a", "trying")  # opened before the fork, which must not be used after it
    children = []
    for _ in range(2):
        if not (child := os.fork()):
            taken = 0
            with suppress(TooOften):
                while taken < 100:
                    limit.take("a", "trying")
                    taken += 1
            os._exit(taken)
        children.append(child)
    counts = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sum(counts) == 49
    assert min(counts) >= 0
    with pytest.raises(TooOften):
        limit.take("a", "trying")
    limit.take("b", "trying")


def test_keys_and_logins_run_out(lab: Lab) -> None:
    with database_of(lab.settings) as db, db.write() as session:
        key, made = new_key(session, accounts.account_id(session, "Rita"), "short", "read", "1")
    with visitors(lab_app(lab.settings)) as people:
        assert people["anonymous"].get("/api/v1/saes", headers={"x-api-key": key}).status_code == 200
        assert people["Rita"].get("/keys").status_code == 200
        past = datetime.now(UTC) - timedelta(seconds=1)
        with database_of(lab.settings) as db, db.write() as session:
            session.execute(sa.update(ApiKey).where(ApiKey.id == made.id).values(expires_at=past))
            session.execute(
                sa.update(Login).where(Login.account_id == accounts.account_id(session, "Rita")).values(expires_at=past)
            )
            assert key not in str(session.execute(sa.select(ApiKey.__table__)).all())
        answer = people["anonymous"].get("/api/v1/saes", headers={"x-api-key": key})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "login_needed")
        assert people["Rita"].get("/keys").headers["location"].startswith("/login")


def test_each_person_asks_live_questions_only_so_often(lab: Lab) -> None:
    question = {"sae": NAMES["public"], "text": "the tide"}
    with visitors(lab_app(lab.settings.model_copy(update={"live_per_minute": 2}))) as people:
        asked = [people["Rita"].post("/api/v1/live/firings", json=question) for _ in range(3)]
        assert [one.status_code for one in asked] == [503, 503, 429]  # no engine runs here
        assert 0 < int(asked[2].headers["retry-after"]) <= 60
        assert people["Ines"].post("/api/v1/live/firings", json=question).status_code == 503
        assert people["anonymous"].post("/api/v1/live/firings", json=question).status_code == 401


def test_many_logins_from_one_address_are_too_many(lab: Lab) -> None:
    with TestClient(lab_app(lab.settings), base_url=URL, follow_redirects=False) as client:
        wrong = {"password": "a wrong one"}  # pragma: allowlist secret
        told = [client.post("/login", data={"name": f"n{n}"} | wrong) for n in range(21)]
        assert [one.status_code for one in told] == [401] * 20 + [429]


CIRCUIT = {"text": "The tide came back", "saes": "sae:shared-sae", "root": "3@3@shared-sae"}


def test_to_wait_for_a_circuit_is_no_question(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Live, "look", lambda _, ticket, __: InLine(ticket=ticket, place=2, answer=None))
    waiting = {**CIRCUIT, "ticket": "x" * 24}
    with visitors(lab_app(lab.settings.model_copy(update={"live_per_minute": 3}))) as people:
        assert [people["Rita"].post("/circuit/look", data=waiting).status_code for _ in range(8)] == [200] * 8


def test_a_step_to_a_circuit_s_address_is_no_question_and_its_page_is_one(lab: Lab) -> None:
    here = f"/saes/{NAMES['public']}/features/3/circuit"
    with visitors(lab_app(lab.settings.model_copy(update={"live_per_minute": 2}))) as people:
        assert [people["Rita"].get(f"{here}?pins=x@1&do=show").status_code for _ in range(5)] == [303] * 5
        assert [people["Rita"].get(here).status_code for _ in range(3)] == [503, 503, 429]  # no engine runs here


def test_a_reader_stores_no_text_of_a_circuit(lab: Lab) -> None:
    asked = {**CIRCUIT, "visibility": "public", "days": "3"}
    with visitors(lab_app(lab.settings)) as people:
        assert people["Rita"].post("/circuit/share", data=asked).status_code == 403
    with Database(lab.settings.url).read() as session:
        assert session.scalars(sa.select(Prompt).where(Prompt.text == CIRCUIT["text"])).all() == []
