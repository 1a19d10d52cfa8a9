"""`/api/v1`: it says what the pages say, walks everything once, and refuses in one shape."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from server.api import export, saes
from server.api.common import BriefRead, api_router
from server.api.parts import PARTS
from server.app import create_app
from server.db import Database
from server.pages.reply import Read
from server.settings import Settings
from server.store import search
from server.store.features import SORT_KEYS
from server.tables import Example, Feature, FeatureHead
from tests.web.conftest import SAE, Visit, at, put

API = "/api/v1"
FEATURES = f"{API}{SAE}/features"


@pytest.fixture(scope="module")
def database(filled: Settings) -> Iterator[Database]:
    """The filled database, to look into."""
    found = Database(filled.url)
    yield found
    found.close()


def got(client: TestClient, address: str, **params: Any) -> Any:
    """The JSON of an address that answers."""
    answer = client.get(address, params=params or None)
    assert answer.status_code == 200, answer.text
    return answer.json()


def walked(client: TestClient, **params: Any) -> list[int]:
    """Every index of a selection, page by page."""
    found: list[int] = []
    after = None
    while True:
        page = got(client, FEATURES, **params, **({"after": after} if after else {}))
        found += [row["index"] for row in page["rows"]]
        after = page["next"]
        if after is None:
            return found


# ---- the same as the pages ----


@pytest.mark.parametrize(
    ("api", "twin", "part"),
    [
        (f"{API}{SAE}", f"{SAE}.json", "overview"),
        (FEATURES, f"{SAE}.json", "table"),
        (f"{API}{SAE}/heads/4", f"{SAE}/heads/4.json", None),
        (f"{API}/models/smollm2-135m/heads", "/models/smollm2-135m/heads.json", None),
        (f"{FEATURES}/3/labels", f"{SAE}/features/3/labels.json", None),
        (f"{API}/lists", "/lists.json", None),
        (f"{API}/labels", "/labels.json", None),
        (f"{API}/jobs/train-smollm2-l17-1", "/jobs/train-smollm2-l17-1.json", None),
        (f"{API}/search?q=tide", "/search.json?q=tide", None),
    ],
)
def test_the_api_answers_what_the_page_does(client: TestClient, api: str, twin: str, part: str | None) -> None:
    whole = got(client, twin)
    assert got(client, api) == (whole[part] if part else whole)


def test_a_feature_in_all_its_parts_is_its_page(client: TestClient) -> None:
    page = got(client, f"{SAE}/features/3.json", all=True)
    mine = got(client, f"{FEATURES}/3", include=",".join(PARTS), all_examples=True)
    for name in ("index", "label", "n_fired", "density", "max_act", "mean_act", "distance", "family", "verdict"):
        assert mine[name] == page[name], name
    assert mine["harvest"] == page["sae"]["harvest"]["id"]
    assert mine["heads"] == {"shares": page["heads"], "agreement": page["agreement"]}
    assert mine["logits"] == {
        "promoted": page["promoted"], "suppressed": page["suppressed"], "edges": page["logit_edges"],
        "counts": page["logit_counts"],
    }  # fmt: skip
    assert mine["families"] == {"verdicts": page["families"], "evidence": page["evidence"], "sample": page["sample"]}
    assert mine["others"]["neighbours"] == page["neighbours"]
    assert mine["others"]["coactive"] == page["coactive"]
    assert mine["activations"]["positions"] == page["positions"]
    assert len(mine["examples"]) == mine["kept"] == 12
    for ours, theirs in zip(mine["examples"], page["examples"], strict=True):
        assert {name: ours[name] for name in ours if name != "dfa"} == {name: theirs[name] for name in ours if name != "dfa"}
        assert ours["dfa"]["entries"] == theirs["dfa"]
        total = sum(one["value"] for one in ours["dfa"]["entries"]) + sum(ours["dfa"]["dropped"]) + sum(ours["dfa"]["before"])
        assert total == pytest.approx(ours["dfa"]["sum"], abs=1e-6)
        assert ours["dfa"]["sum"] + ours["bias"] == pytest.approx(ours["preact"], abs=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_asked_for_is_null(client: TestClient, part: str) -> None:
    alone = got(client, f"{FEATURES}/3", include=part)
    filled = {name for name in PARTS if name != "dfa" and alone[name] is not None}
    assert filled == {"examples" if part == "dfa" else part}
    if part in ("examples", "dfa"):
        assert all((one["dfa"] is None) == (part == "examples") for one in alone["examples"])
    bare = got(client, f"{FEATURES}/3")
    assert all(bare[name] is None for name in PARTS if name != "dfa")


def test_a_batch_is_its_features_one_by_one(client: TestClient) -> None:
    keys = [{"sae": "smollm2-l17", "index": index} for index in (5, 3, 7, 3, 59)]
    answer = client.post(f"{API}/features/batch", json={"features": keys, "include": "dfa,heads,others"})
    assert answer.status_code == 200
    assert answer.json()["features"] == [got(client, f"{FEATURES}/{key['index']}", include="dfa,heads,others") for key in keys]


def test_models_saes_harvests_and_families_are_those_of_the_database(client: TestClient, database: Database) -> None:
    assert [one["name"] for one in got(client, f"{API}/models")["models"]] == ["smollm2-135m"]
    assert got(client, f"{API}/models/smollm2-135m")["n_heads"] == 9
    assert [one["sae"]["name"] for one in got(client, f"{API}/saes")["saes"]] == ["smollm2-l17"]
    assert got(client, f"{API}/saes", layer=3)["saes"] == []
    assert got(client, f"{API}/saes", archived=True)["saes"] == []
    (line,) = got(client, f"{API}/harvests")["harvests"]
    assert got(client, f"{API}/harvests/{line['id']}") == line
    assert got(client, f"{API}{SAE}/harvests")["harvests"] == [line]
    with database.read() as session:
        counted = session.execute(
            sa.select(Feature.family, sa.func.count()).where(Feature.n_fired > 0).group_by(Feature.family)
        ).all()
        n_examples = session.scalar(sa.select(sa.func.count(Example.id)))
    assert {one["key"]: one["features"] for one in got(client, f"{API}{SAE}/families")["families"]} == {
        family or "unclear": n for family, n in counted
    }
    exported = [
        json.loads(line) for line in client.get(f"{FEATURES}/export?include=examples&all_examples=true").text.splitlines()
    ]
    assert sum(one["kept"] for one in exported) == sum(len(one["examples"]) for one in exported) == n_examples
    assert len(got(client, f"{API}{SAE}/heads")["heads"]) == 9


# ---- paging and filters ----


@pytest.mark.parametrize("way", ["", "-"])
@pytest.mark.parametrize("key", SORT_KEYS)
def test_paging_walks_everything_once_in_the_order_of_the_page(client: TestClient, key: str, way: str) -> None:
    found = walked(client, sort=way + key, limit=7)
    assert sorted(found) == list(range(60))
    assert found == [row["index"] for row in got(client, f"{SAE}.json", sort=way + key, limit=200)["table"]["rows"]]


FILTERS: dict[str, tuple[dict[str, Any], Any]] = {
    "min_density": ({"min_density": 0.001}, Feature.density >= 0.001),
    "max_density": ({"max_density": 0.001}, Feature.density <= 0.001),
    "min_max": ({"min_max": 6}, Feature.max_act >= 6),
    "max_max": ({"max_max": 6}, Feature.max_act <= 6),
    "min_share": ({"min_share": 0.5}, Feature.top_head_share >= 0.5),
    "min_dfa_share": ({"min_dfa_share": 0.5}, Feature.top_head_dfa_share >= 0.5),
    "family": ({"family": "induction"}, Feature.family == "induction"),
    "unclear": ({"family": "unclear"}, Feature.family.is_(None)),
    "dead": ({"dead": True}, Feature.n_fired == 0),
    "live": ({"dead": False}, Feature.n_fired > 0),
    "leads": ({"leads": True, "head": 4}, Feature.top_head == 4),
    "leads_dfa": ({"leads_dfa": True, "head": 4}, Feature.top_head_dfa == 4),
    "unlabelled": ({"labelled": False}, sa.true()),
}


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_selects_what_sql_does(client: TestClient, database: Database, name: str) -> None:
    params, condition = FILTERS[name]
    with database.read() as session:
        expected = sorted(session.scalars(sa.select(Feature.idx).where(condition)))
    assert expected
    assert sorted(walked(client, **params, limit=9)) == expected
    assert got(client, FEATURES, **params)["n_matching"] == len(expected)
    lines = client.get(f"{FEATURES}/export", params=params)
    assert sorted(json.loads(line)["index"] for line in lines.text.splitlines()) == expected
    assert lines.headers["x-headscope-features"] == str(len(expected))


def test_shares_of_a_head_are_sorted_and_filtered_as_sql_does(client: TestClient, database: Database) -> None:
    with database.read() as session:
        at_head = sa.select(FeatureHead.idx).where(FeatureHead.head == 2, FeatureHead.norm_share >= 0.05)
        expected = list(session.scalars(at_head.order_by(FeatureHead.norm_share.desc(), FeatureHead.idx.desc())))
    assert walked(client, head=2, min_share=0.05, limit=5) == expected


# ---- search ----


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The web process on a harvest that can be searched."""
    settings = put(at(tmp_path_factory.mktemp("searched")))
    database = Database(settings.url)
    search.write(database, 1, search.unfenced)
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize(
    ("kind", "theirs"), [("text", "text"), ("token", "token"), ("logit", "promotes"), ("suppresses", "suppresses")]
)
def test_search_finds_what_the_page_finds(searched: TestClient, kind: str, theirs: str) -> None:
    ours = got(searched, f"{API}{SAE}/search", q="tide", kind=kind)
    assert ours == got(searched, f"{SAE}/search.json", q="tide", kind=theirs)
    assert ours["hits"]
    assert got(searched, f"{API}/search", q="tide") == got(searched, "/search.json", q="tide")


# ---- ETags ----


def test_an_etag_spares_what_has_not_changed_and_a_label_changes_it(visit: Visit) -> None:
    maren = visit()
    for address in (f"{FEATURES}/3", f"{FEATURES}/3?include=dfa", FEATURES, f"{API}{SAE}", f"{API}{SAE}/heads"):
        tag = maren.get(address).headers["etag"]
        assert maren.get(address, headers={"If-None-Match": tag}).status_code == 304
        assert maren.get(address, headers={"If-None-Match": "*"}).status_code == 304
        assert maren.get(address, headers={"If-None-Match": '"another"'}).status_code == 200
    assert maren.get(f"{FEATURES}/3").headers["etag"] != maren.get(f"{FEATURES}/3?include=dfa").headers["etag"]
    tag = maren.get(f"{FEATURES}/3").headers["etag"]
    assert maren.post(f"{FEATURES}/3/labels", json={"text": "tide tables"}).status_code == 201
    answer = maren.get(f"{FEATURES}/3", headers={"If-None-Match": tag})
    assert answer.status_code == 200
    assert answer.json()["label"] == "tide tables"


# ---- refusals ----


REFUSED = [
    ("GET", "/nowhere", None, 404, "not_found", None),
    ("GET", "/saes/gone", None, 404, "not_found", "sae"),
    ("GET", "/saes/smollm2-l17/features/60", None, 404, "not_found", "index"),
    ("GET", "/saes/smollm2-l17/features/x", None, 422, "usage_error", "index"),
    ("GET", "/saes/smollm2-l17/features?colour=red", None, 422, "unknown_parameter", "colour"),
    ("GET", "/saes?page=2", None, 422, "unknown_parameter", "page"),
    ("GET", "/models?x=1", None, 422, "unknown_parameter", "x"),
    ("GET", "/saes/smollm2-l17/features?sort=colour", None, 422, "usage_error", "sort"),
    ("GET", "/saes/smollm2-l17/features?leads=true", None, 422, "usage_error", "head"),
    ("GET", "/saes/smollm2-l17/features?head=9", None, 422, "usage_error", "head"),
    ("GET", "/saes/smollm2-l17/features?limit=201", None, 422, "usage_error", "limit"),
    ("GET", "/saes/smollm2-l17/features?after=x~1", None, 422, "usage_error", "after"),
    ("GET", "/saes/smollm2-l17/features?after=000", None, 422, "usage_error", "after"),
    ("GET", f"/saes/smollm2-l17/features?sort=idx&after=1~{10**30}", None, 422, "usage_error", "after"),
    ("GET", "/saes/smollm2-l17/features/3?include=everything", None, 422, "usage_error", "include"),
    ("GET", "/saes/smollm2-l17/features/export?format=xlsx", None, 422, "usage_error", "format"),
    ("GET", "/saes/smollm2-l17/features/export?limit=3", None, 422, "unknown_parameter", "limit"),
    ("GET", "/saes/smollm2-l17/search?kind=colour&q=x", None, 422, "usage_error", "kind"),
    ("GET", "/saes/smollm2-l17/search?kind=text&q=--", None, 422, "usage_error", "q"),
    ("GET", f"/labels?before={10**30}", None, 422, "usage_error", "before"),
    ("GET", "/jobs/gone", None, 404, "unknown_job", "job"),
    ("GET", "/jobs/gone/events", None, 404, "unknown_job", "job"),
    ("DELETE", "/saes", None, 405, "method_not_allowed", None),
    ("POST", "/features/batch", {"features": []}, 422, "usage_error", "features"),
    ("POST", "/features/batch", {"features": [{"sae": "smollm2-l17", "index": -1}]}, 422, "usage_error", "index"),
    ("POST", "/features/batch", {"features": [{"sae": "smollm2-l17", "index": 3}], "x": 1}, 422, "usage_error", "x"),
    ("POST", "/features/batch", {"features": [{"sae": "gone", "index": 3}]}, 404, "not_found", "sae"),
    ("POST", "/features/batch", {"features": [{"sae": "smollm2-l17", "index": i} for i in [1] * 101]}, 422, "usage_error",
     "features"),
    ("POST", "/lists", {"name": "x"}, 422, "usage_error", "X-Author"),
    ("POST", "/jobs", {"kind": "dance"}, 422, "usage_error", "kind"),
    ("POST", "/jobs", {"kind": "harvest", "config": {"saes": [], "corpus": "demo"}}, 422, "usage_error", "saes"),
    ("POST", "/jobs", {"kind": "harvest", "config": {"saes": ["gone"], "corpus": "demo"}}, 404, "not_found", "sae"),
    ("POST", "/live/attribution", {"sae": "smollm2-l17", "index": 3, "text": "The tide"}, 503, "engine_away", None),
    ("POST", "/live/firings", {"sae": "smollm2-l17", "text": "The tide"}, 503, "engine_away", None),
    ("POST", "/live/firings", {"sae": "gone", "text": "The tide"}, 404, "not_found", "sae"),
    ("POST", "/live/firings", {"sae": "smollm2-l17"}, 422, "usage_error", "text"),
    ("POST", "/features/batch", [], 422, "usage_error", "body"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "status", "code", "field"), REFUSED)
def test_every_refusal_has_one_shape_and_names_the_field(
    client: TestClient, method: str, path: str, body: Any, status: int, code: str, field: str | None
) -> None:
    answer = client.request(method, API + path, json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "field"}
    assert (error["code"], error["field"]) == (code, field)
    assert error["message"].endswith(".")
    assert answer.headers["content-type"] == "application/json"
    assert ("retry-after" in answer.headers) == (status == 503)


def test_a_body_that_is_no_json_is_said_to_be_what_is_wrong(client: TestClient) -> None:
    answer = client.post(f"{API}/features/batch", content=b'{"features": [', headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "body"


def test_a_method_that_is_not_possible_says_which_are(client: TestClient) -> None:
    answer = client.delete(f"{API}/saes")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
    for path, methods in ((f"{API}/saes", "GET, HEAD, OPTIONS"), (f"{API}/features/batch", "POST, OPTIONS")):
        asked = client.options(path)
        assert (asked.status_code, asked.content, asked.headers["allow"]) == (204, b"", methods)
    assert client.options(f"{API}/nowhere").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/saes",
        "/saes/smollm2-l17/features/3?include=examples,dfa",
        "/saes/gone",
        "/saes?x=1",
        "/saes/smollm2-l17/features/export",
    ],
)
def test_head_answers_as_get_without_the_body(client: TestClient, path: str) -> None:
    named = {"X-Request-ID": "a-b-c-d-e-f"}
    whole, head = client.get(API + path, headers=named), client.head(API + path, headers=named)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert whole.content
    assert head.headers == whole.headers


def test_of_a_stream_no_more_than_its_first_part_is_made_for_head(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    real = export.feature_pages
    monkeypatch.setattr(export.Source.read, "__defaults__", (1,))
    monkeypatch.setattr(export, "feature_pages", lambda *given, **named: read.append(given) or real(*given, **named))
    answer = client.head(f"{FEATURES}/export?include=examples")
    assert (answer.status_code, answer.headers["x-headscope-features"]) == (200, "60")
    assert len(read) <= 2


def test_what_is_sent_is_compressed_but_for_what_is_already(client: TestClient) -> None:
    for path, encoding in (
        (f"{FEATURES}/3?include=examples,dfa", "gzip"), (f"{FEATURES}/export", "gzip"),
        (f"{FEATURES}/export?format=parquet", None),
    ):  # fmt: skip
        assert client.get(path, headers={"Accept-Encoding": "gzip"}).headers.get("content-encoding") == encoding
        assert "content-encoding" not in client.get(path, headers={"Accept-Encoding": "identity"}).headers


def test_a_fault_of_ours_is_500_in_the_same_shape(filled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(saes.registry, "models", broken)
    with TestClient(create_app(filled), base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        answer = client.get(f"{API}/models")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_is_not_json_is_refused(visit: Visit, kind: str | None) -> None:
    answer = visit().post(f"{API}/lists", content=b'{"name": "x"}', headers={"Content-Type": kind} if kind else {})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "no_json"


def test_a_page_of_another_site_changes_nothing(visit: Visit) -> None:
    maren = visit()
    answer = maren.post(f"{API}/lists", json={"name": "x"}, headers={"Origin": "http://elsewhere.example"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "cross_origin"
    assert got(maren, f"{API}/lists")["lists"] == []


def test_the_api_answers_below_the_path_of_a_server_that_it_is_part_of(filled: Settings) -> None:
    with TestClient(create_app(filled), base_url="http://127.0.0.1:8000", root_path="/lab") as client:
        assert got(client, f"/lab{API}/models") == got(client, f"{API}/models") != []


def test_a_route_whose_session_would_be_closed_or_no_session_is_refused() -> None:
    router = api_router("Broken")

    async def late(read: BriefRead) -> None: ...

    def of_a_page(read: Read) -> None: ...

    with pytest.raises(AssertionError, match="late is async"):
        router.get("/late")(late)
    with pytest.raises(AssertionError, match="of_a_page is no BriefRead"):
        router.get("/page")(of_a_page)


def test_a_former_name_leads_to_the_present_one(visit: Visit) -> None:
    maren = visit()
    assert maren.post(f"{SAE}/manage", data={"name": "renamed", "description": ""}).status_code == 303
    answer = maren.get(f"{FEATURES}/3?include=dfa")
    assert answer.status_code == 307
    assert answer.headers["location"] == f"{API}/saes/renamed/features/3?include=dfa"
