"""`/api/...` as Neuronpedia's scripts know it: shapes, ids, errors, and numbers that are those of our own pages."""

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from server.app import create_app
from server.db import Database
from server.live import FeatureChanged, Live, LiveCodes, LiveSources, LiveSteered, SourcesQuestion, SteerQuestion, TextQuestion
from server.settings import Settings
from server.store import manage
from server.store.saes import find_sae
from server.store.sources import without_layer
from server.tables import Model
from tests.web.conftest import SAE, at
from tests.web.factory import Shape, add_sae, fill
from tests.web.reading import counted

MODEL, SOURCE = "smollm2-135m", "17-smollm2-l17"
FEATURE = f"/api/feature/{MODEL}/{SOURCE}"
OF = {"modelId": MODEL, "layer": SOURCE}
UP = {"modelId": MODEL, "source": SOURCE}
STEER = {"modelId": MODEL, "prompt": "The tide", "features": [{**OF, "index": "3", "strength": 4}], "seed": None}
DEAD = 7  # of the factory's features

# Columns of Neuronpedia's tables, from its Prisma schema of August 2026.
_NEURON = """
    modelId layer index sourceSetName creatorId createdAt maxActApprox hasVector vector vectorLabel vectorDefaultSteerStrength
    hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
    correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices
    correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero
    freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values
    decoder_weights_dist umap_cluster umap_log_feature_sparsity umap_x umap_y
"""
AROUND = {"model", "source", "sourceSet", "lists", "creator", "comments", "activations", "explanations"}
_ACTIVATION = """
    id tokens dataIndex index layer modelId dataSource maxValue maxValueTokenIndex minValue values dfaValues dfaTargetIndex
    dfaMaxValue zQIndices zKIndices zValues creatorId createdAt lossValues logitContributions binMin binMax binContains
    qualifyingTokenIndex
"""
NEURON, ACTIVATION = frozenset(_NEURON.split()), frozenset(_ACTIVATION.split())
EXPLANATION = {"id", "description", "explanationModelName", "typeName", "scores", "triggeredByUser"}


def post(client: TestClient, path: str, body: Any = None) -> Any:
    """The answer to a posted body."""
    response = client.post(f"/api/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


# ---- features ----


def test_a_feature_has_every_column_and_relation_of_neuronpedias(client: TestClient) -> None:
    row = client.get(f"{FEATURE}/3").json()
    assert set(row) == NEURON | AROUND | {"headscope"}
    assert (row["modelId"], row["layer"], row["index"], row["sourceSetName"]) == (MODEL, SOURCE, "3", "smollm2-l17")
    for activation in row["activations"]:
        assert set(activation) == ACTIVATION | {"source", "headscope"}
    assert row["source"]["id"] == SOURCE
    assert row["source"]["setName"] == row["sourceSet"]["name"] == "smollm2-l17"
    assert row["model"]["id"] == MODEL
    assert row["model"]["layers"] == 30


def test_numbers_are_those_of_the_features_own_page(client: TestClient) -> None:
    row, page = client.get(f"{FEATURE}/3").json(), client.get(f"{SAE}/features/3.json?examples=all").json()
    assert row["frac_nonzero"] == page["density"]
    assert row["maxActApprox"] == page["max_act"]
    assert row["decoder_weights_dist"] == [head["norm_share"] for head in page["heads"]]
    assert sum(row["decoder_weights_dist"]) == pytest.approx(1, abs=1e-6)
    assert list(zip(row["pos_str"], row["pos_values"], strict=True)) == [(t["text"], t["value"]) for t in page["promoted"]]
    assert list(zip(row["neg_str"], row["neg_values"], strict=True)) == [(t["text"], t["value"]) for t in page["suppressed"]]
    assert row["freq_hist_data_bar_heights"] == page["histogram_counts"]
    middles = zip(page["histogram_edges"], row["freq_hist_data_bar_values"], page["histogram_edges"][1:], strict=False)
    assert all(low < middle < high for low, middle, high in middles)
    assert len(row["logits_hist_data_bar_values"]) == len(row["logits_hist_data_bar_heights"]) == 40
    near = [(one["index"], one["cosine"]) for one in page["neighbours"]]
    assert list(zip(row["topkCosSimIndices"], row["topkCosSimValues"], strict=True)) == near
    assert row["hookName"] == "blocks.17.attn.hook_z"


@pytest.mark.parametrize("index", [0, 3, 12])
def test_values_and_dfa_stand_beside_their_own_tokens(client: TestClient, index: int) -> None:
    page = client.get(f"{SAE}/features/{index}.json?examples=all").json()
    stored = {(one["band"], one["rank"]): one for one in page["examples"]}
    rows = client.get(f"{FEATURE}/{index}").json()["activations"]
    assert {(row["headscope"]["band"], row["headscope"]["rank"]) for row in rows} == set(stored)
    for row in rows:
        one = stored[row["headscope"]["band"], row["headscope"]["rank"]]
        start = one["start"]
        assert row["tokens"] == one["texts"]
        assert len(row["tokens"]) == len(row["values"]) == len(row["dfaValues"])
        fires = {place + start: value for place, value in enumerate(row["values"]) if value}
        assert fires == pytest.approx({int(place): value for place, value in one["acts"].items()}, rel=1e-5)
        by_source: dict[int, float] = {}
        by_head = [a + b for a, b in zip(one["dropped"], one["before"], strict=True)]
        for entry in one["dfa"]:
            by_source[entry["src"]] = by_source.get(entry["src"], 0.0) + entry["value"]
            by_head[entry["head"]] += entry["value"]
        shown = {place + start: value for place, value in enumerate(row["dfaValues"]) if value}
        assert shown == pytest.approx(by_source, abs=1e-5)
        assert row["headscope"]["dfaByHead"] == pytest.approx(by_head, abs=1e-5)
        assert row["dfaTargetIndex"] == row["qualifyingTokenIndex"] == one["dest"] - start
        assert row["values"][row["dfaTargetIndex"]] == pytest.approx(one["act"], rel=1e-5)
        assert row["dfaMaxValue"] == max(row["dfaValues"])
        assert not any(row["dfaValues"][row["dfaTargetIndex"] + 1 :]), "no source lies after the destination"


def test_dfa_with_what_is_left_over_gives_the_preactivation(client: TestClient) -> None:
    for row in client.get(f"{FEATURE}/3").json()["activations"]:
        check = row["headscope"]
        total = sum(row["dfaValues"]) + check["dropped"] + check["before"] + check["bias"]
        assert total == pytest.approx(check["preact"], abs=2e-5)
        assert sum(check["dfaByHead"]) + check["bias"] == pytest.approx(check["preact"], abs=2e-5)


def test_examples_come_strongest_first_and_say_their_band(client: TestClient) -> None:
    rows = client.get(f"{FEATURE}/3").json()["activations"]
    strengths = [row["values"][row["dfaTargetIndex"]] for row in rows]
    assert strengths == sorted(strengths, reverse=True)
    assert strengths[0] == max(row["maxValue"] for row in rows)
    assert all(row["maxValue"] == row["values"][row["maxValueTokenIndex"]] == max(row["values"]) for row in rows)
    for row in rows:
        if row["headscope"]["band"] == 0:
            assert (row["binMin"], row["binMax"], row["binContains"]) == (None, None, None)
        else:
            assert row["binMin"] < row["binMax"]
            assert 0 <= row["binContains"] <= 1
    assert {row["headscope"]["band"] for row in rows} == {0, 1, 2, 3}


def test_a_dead_feature_has_no_examples(client: TestClient) -> None:
    row = client.get(f"{FEATURE}/{DEAD}").json()
    assert (row["activations"], row["frac_nonzero"], row["maxActApprox"]) == ([], 0, 0)
    refused = client.post("/api/activation/get", json={"modelId": MODEL, "source": SOURCE, "index": str(DEAD)})
    assert refused.status_code == 404


def test_activation_get_gives_the_features_examples(client: TestClient) -> None:
    rows = post(client, "activation/get", {"modelId": MODEL, "source": SOURCE, "index": "3"})
    assert rows == client.get(f"{FEATURE}/3").json()["activations"]


def test_a_batch_keeps_its_order_and_cuts_examples_where_asked(client: TestClient) -> None:
    rows = post(client, "features", [{**OF, "index": 12}, {**OF, "index": "3", "maxActsToReturn": 2}, {**OF, "index": 10**6}])
    assert [row["index"] for row in rows] == ["12", "3"], "what is not there is left out"
    assert [len(row["activations"]) for row in rows] == [12, 2]
    alone = client.get(f"{FEATURE}/3").json()["activations"]
    assert rows[1]["activations"] == alone[:2]
    assert set(rows[0]) == NEURON | {"activations", "explanations", "headscope"}
    assert post(client, "features", []) == []


def test_an_offset_counts_features_that_fired(client: TestClient) -> None:
    first, second, last = (post(client, "features-offset", {**OF, "offset": offset}) for offset in (0, 25, 50))
    indices = [int(row["index"]) for row in (*first, *second, *last)]
    assert (len(first), len(second), len(last)) == (25, 25, 5)
    assert indices == sorted(set(range(60)) - {7, 19, 31, 43, 55})
    assert {"model", "sourceSet", "activations", "explanations"} < set(first[0])
    assert post(client, "features-offset", OF) == first


def test_a_feature_costs_few_queries_and_so_does_a_batch(filled: Settings) -> None:
    app = create_app(filled)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        client.get(f"{FEATURE}/3")
        with counted(app.state.db.engine) as one:
            client.get(f"{FEATURE}/3")
        with counted(app.state.db.engine) as many:
            post(client, "features", [{**OF, "index": index} for index in range(50)])
    assert len(one) <= 7, one
    assert len(many) <= 5, many


# ---- ids ----


@pytest.fixture
def several(settings: Settings) -> Iterator[TestClient]:
    """SAEs whose names overlap, of two layers."""
    database = Database(settings.url)
    small = {"n_features": 10, "n_dead": 0, "running_job": False}
    fill(database, Shape(sae="demo-l17", **small))
    with database.write() as session:
        add_sae(session, Shape(sae="demo-l5", layer=5, seed=1, **small))
        add_sae(session, Shape(sae="demo.L05", layer=5, seed=2, **small))
        add_sae(session, Shape(sae="9-att-kk", layer=9, seed=3, **small))
        add_sae(session, Shape(sae="old", layer=3, seed=4, **small))
        session.execute(sa.update(Model).values(name="HuggingFaceTB/SmolLM2-135M"))
    with database.write() as session:
        manage.describe(session, find_sae(session, "old"), "new", "")
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-135M", "huggingfacetb/smollm2-135m", "smollm2-135m", "SmolLM2-135M"])
def test_a_model_goes_by_its_name_with_or_without_who_published_it(several: TestClient, model: str) -> None:
    row = several.get(f"/api/feature/{model}/17-demo-l17/1").json()
    assert (row["modelId"], row["layer"]) == (model, "17-demo-l17"), "what was asked for comes back"


@pytest.mark.parametrize(
    ("source", "sae"),
    [
        ("17-demo-l17", "demo-l17"),
        ("17-demo", "demo-l17"),
        ("5-demo-l5", "demo-l5"),
        ("5-demo.L05", "demo.L05"),
        ("9-att-kk", "9-att-kk"),
        ("9-9-att-kk", "9-att-kk"),
        ("3-new", "new"),
        ("3-old", "new"),
    ],
)
def test_a_source_id_means_one_sae(several: TestClient, source: str, sae: str) -> None:
    row = several.get(f"/api/feature/smollm2-135m/{source}/1").json()
    page = several.get(f"/saes/{sae}/features/1.json").json()
    assert row["maxActApprox"] == page["max_act"]
    assert row["layer"] == source


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("5-demo", "could be HuggingFaceTB/SmolLM2-135M/5-demo-l5 and HuggingFaceTB/SmolLM2-135M/5-demo.L05"),
        ("4-demo", "has no source '4-demo'. There are: 3-new, 5-demo-l5, 5-demo.L05, 9-9-att-kk, 17-demo-l17."),
        ("17", "sources are called {layer}-{set}"),
        ("demo-l17", "sources are called {layer}-{set}"),
    ],
)
def test_an_id_that_means_none_or_two_is_a_404_with_a_sentence(several: TestClient, source: str, says: str) -> None:
    response = several.get(f"/api/feature/smollm2-135m/{source}/1")
    assert response.status_code == 404
    assert says in response.json()["error"]


def test_a_set_holds_its_saes_by_layer(several: TestClient) -> None:
    row = several.get("/api/source-set/smollm2-135m/demo").json()
    assert [source["id"] for source in row["sources"]] == ["17-demo"], "layer 5 has two"
    assert [source["id"] for source in several.get("/api/source-set/smollm2-135m/demo-l5").json()["sources"]] == ["5-demo-l5"]
    missing = several.get("/api/source-set/smollm2-135m/nothing")
    assert missing.status_code == 404
    assert "no source set 'nothing'" in missing.json()["message"]


@pytest.mark.parametrize(
    ("name", "layer", "rest"),
    [
        ("smollm2-l17", 17, "smollm2"), ("layer_17-topk", 17, "topk"), ("a.L017.b", 17, "a.b"), ("smollm2-l17", 1, None),
        ("l17", 17, None), ("tall17", 17, None), ("gpt2-17", 17, None),
    ],
)  # fmt: skip
def test_a_name_without_its_layer(name: str, layer: int, rest: str | None) -> None:
    assert without_layer(name, layer) == rest


# ---- errors ----


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("features", {"modelId": MODEL}, 400, "valid list"),
        ("features", [{"modelId": MODEL, "layer": SOURCE}], 400, "index"),
        ("features", [{**OF, "index": 1.5}], 400, "whole number"),
        ("features", [{**OF, "index": -1}], 400, "index"),
        ("features", [{**OF, "index": 10**12}], 400, "index"),
        ("features", [{**OF, "modelId": "a\0b", "index": 1}], 400, "character 0"),
        ("features", [{**OF, "index": 1}] * 201, 400, "200"),
        ("features", [{**OF, "layer": "3-nothing", "index": 1}], 404, "3-nothing"),
        ("features-offset", {**OF, "offset": -1}, 400, "offset"),
        ("activation/get", {"modelId": MODEL}, 400, "Field required"),
        ("activation/get", {"modelId": MODEL, "source": SOURCE, "index": "60"}, 404, "0 to 59"),
        ("activation/new", {"customText": "hello"}, 400, "feature"),
        ("activation/new", {"feature": {**OF, "index": "1"}}, 400, "customText"),
        ("explanation/search", {"modelId": MODEL, "layers": [SOURCE], "query": "ab"}, 400, "3 characters"),
        ("explanation/search", {"modelId": MODEL, "layers": [], "query": "abc"}, 400, "layers"),
        ("list/get", {"listId": "cm0"}, 400, "listId"),
        ("list/get", {"listId": "77"}, 404, "There is no list 77"),
        ("list/new", {"name": " "}, 400, "name is empty"),
        ("list/add-features", {"listId": "1", "featuresToAdd": [{**OF, "index": 1}] * 101}, 400, "100"),
        ("bookmark/add", {**OF, "index": 60}, 404, "0 to 59"),
        ("feature/upload-batch", {**UP, "features": [{"index": 1, "density": 0.1}]}, 400, "density"),
        ("feature/upload-batch", {**UP, "features": []}, 400, "features"),
        ("steer", {"prompt": "a"}, 400, "Field required"),
        ("steer", {**STEER, "steer_method": "ORTHOGONAL_DECOMP"}, 400, "SIMPLE_ADDITIVE"),
        ("steer", {**STEER, "stream": True}, 400, "stream"),
        ("steer", {**STEER, "strength_multiplier": 1e6}, 400, "at most 10000"),
        ("steer", {**STEER, "features": [{**OF, "index": 60, "strength": 1}]}, 404, "0 to 59"),
        ("steer-chat", {"prompt": "a"}, 404, "/api/steer-chat"),
    ],
)  # fmt: skip
def test_a_refusal_is_a_sentence_under_both_names(client: TestClient, path: str, body: Any, status: int, says: str) -> None:
    for slash in ("", "/"):
        response = client.post(f"/api/{path}{slash}", json=body)
        assert response.status_code == status, response.text
        assert response.json() == {"error": response.json()["message"], "message": response.json()["error"]}
        assert says in response.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"null", b'"\\ud800"', b"[1"])
def test_a_body_that_is_no_json_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/api/features", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]


@pytest.mark.parametrize("index", ["x", "-1", "1.0", "60", "٣", "99999999999"])
def test_an_index_that_is_none_is_a_404(client: TestClient, index: str) -> None:
    response = client.get(f"{FEATURE}/{index}")
    assert response.status_code == 404
    assert set(response.json()) == {"error", "message"}


def test_an_sae_without_a_harvest_says_so(settings: Settings) -> None:
    database = Database(settings.url)
    fill(database, Shape(n_features=4, n_dead=0))
    with database.write() as session:
        session.execute(sa.text("update sae set harvest_id = null"))
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        response = client.get(f"{FEATURE}/3")
        assert response.status_code == 404
        assert "no published harvest" in response.json()["error"]
        assert client.get("/api/source-set/smollm2-135m/smollm2-l17").json()["sources"][0]["hasDashboards"] is False


def test_a_method_that_is_not_possible_is_refused_in_the_same_shape(client: TestClient) -> None:
    response = client.get("/api/features")
    assert response.status_code == 405
    assert response.json()["error"]


def test_another_sites_page_is_refused_in_the_same_shape(client: TestClient) -> None:
    response = client.post("/api/list/new", json={"name": "x"}, headers={"Origin": "https://elsewhere.example"})
    assert response.status_code == 403
    assert "another site" in response.json()["error"]


def test_a_database_that_is_away_is_a_503(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = at(tmp_path)
    fill(database := Database(settings.url), Shape(n_features=2, n_dead=0))
    database.close()

    def away(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("select", {}, Exception("gone"))

    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        client.get(f"{FEATURE}/1")
        monkeypatch.setattr("server.api.neuronpedia.features.find_source", away)
        response = client.get(f"{FEATURE}/1")
    assert response.status_code == 503
    assert "does not answer" in response.json()["error"]


@pytest.mark.parametrize("key", [None, "sk-np-anything"])
def test_any_key_is_taken_while_there_are_no_accounts(client: TestClient, key: str | None) -> None:
    headers = {} if key is None else {"X-Api-Key": key}
    assert client.get(f"{FEATURE}/3", headers=headers).status_code == 200


# ---- every address, whatever is asked that is valid ----


@examples(max_examples=40, deadline=None)
@given(st.integers(0, 59), st.integers(0, 40), st.booleans())
def test_whatever_valid_thing_is_asked_the_shape_holds(client: TestClient, index: int, most: int, slash: bool) -> None:
    end = "/" if slash else ""
    row = client.get(f"{FEATURE}/{index}{end}").json()
    (batch,) = post(client, f"features{end}", [{**OF, "index": index, "maxActsToReturn": most}])
    assert {key: row[key] for key in batch if key != "activations"} == {k: v for k, v in batch.items() if k != "activations"}
    assert batch["activations"] == row["activations"][:most]
    for one in row["activations"]:
        assert len(one["tokens"]) == len(one["values"]) == len(one["dfaValues"])
        assert 0 <= one["dfaTargetIndex"] < len(one["tokens"])
        assert one["minValue"] <= one["maxValue"]
    page = post(client, f"features-offset{end}", {**OF, "offset": index})
    assert len(page) == max(0, min(25, 55 - index))


# ---- what people write ----


def test_lists_are_made_filled_changed_and_deleted(maren: TestClient) -> None:
    made = post(maren, "list/new/", {"name": "Numbers", "description": "why", "testText": None})
    assert made["url"].endswith(f"/lists/{made['id']}")
    assert (made["userId"], made["user"]) == ("Maren", {"name": "Maren"})
    entries = [{**OF, "index": "3", "description": "first"}, {**OF, "layer": "17-smollm2", "index": 5}]
    added = post(maren, "list/add-features", {"listId": made["id"], "featuresToAdd": entries})
    assert [(row["layer"], row["index"], row["description"]) for row in added] == [
        (SOURCE, "3", "first"),
        ("17-smollm2", "5", ""),
    ]
    whole = post(maren, "list/get", {"listId": made["id"]})
    assert [(row["layer"], row["index"]) for row in whole["neurons"]] == [(SOURCE, "3"), (SOURCE, "5")], "under their own ids"
    assert [len(row["neuron"]["activations"]) for row in whole["neurons"]] == [3, 3]
    assert [one["list"]["name"] for one in maren.get(f"{FEATURE}/3").json()["lists"]] == ["Numbers"]

    of = {"listId": made["id"], **OF, "index": "3"}
    assert post(maren, "list/edit-feature", {**of, "description": "better"})["description"] == "better"
    assert post(maren, "list/remove", of)["index"] == "3"
    assert [row["index"] for row in post(maren, "list/get", {"listId": made["id"]})["neurons"]] == ["5"]
    assert maren.post("/api/list/remove", json=of).status_code == 404
    assert post(maren, "list/update", {"listId": made["id"], "name": "Digits"})["name"] == "Digits"
    assert [row["name"] for row in post(maren, "list/list")] == ["Digits"]
    assert post(maren, "list/delete", {"listId": made["id"]}) is True
    assert post(maren, "list/list") == []
    assert "was deleted by Maren" in maren.post("/api/list/get", json={"listId": made["id"]}).json()["error"]


def test_a_list_is_made_with_all_its_features_or_not_at_all(maren: TestClient) -> None:
    made = post(maren, "list/new-with-features", {"name": "Two", "features": [{**OF, "index": 3}, {**OF, "index": 4}]})
    assert len(post(maren, "list/get", {"listId": made["id"]})["neurons"]) == 2
    refused = maren.post(
        "/api/list/new-with-features", json={"name": "Half", "features": [{**OF, "index": 3}, {**OF, "index": 60}]}
    )
    assert refused.status_code == 404
    assert [row["name"] for row in post(maren, "list/list")] == ["Two"]


def test_bookmarks_are_ones_own_stars(maren: TestClient, visit: Any) -> None:
    script = visit(None)
    assert post(maren, "bookmark/add", {**OF, "index": "3"})["userId"] == "Maren"
    assert post(script, "bookmark/add", {**OF, "index": "4"})["userId"] == "Neuronpedia client"
    assert [row["index"] for row in post(maren, "user/bookmarks")] == ["3"]
    assert [row["index"] for row in post(script, "user/bookmarks")] == ["4"]
    assert "Maren" in maren.get(f"{SAE}/features/3/labels.json").json()["stars"]
    assert post(maren, "bookmark/delete", {**OF, "index": "4"}) == {"count": 0}
    assert post(maren, "bookmark/delete", {**OF, "index": "3"}) == {"count": 1}
    assert post(maren, "user/bookmarks") == []


def test_labels_and_notes_come_as_explanations_and_comments(maren: TestClient) -> None:
    maren.post(f"{SAE}/features/3/labels", data={"label": "numbers in a row"})
    maren.post(f"{SAE}/features/3/notes", data={"note": "Look at the second band."})
    row = maren.get(f"{FEATURE}/3").json()
    (explanation,) = row["explanations"]
    assert set(explanation) >= EXPLANATION
    assert (explanation["description"], explanation["typeName"], explanation["explanationModelName"]) == (
        "numbers in a row",
        "human",
        None,
    )
    assert explanation["triggeredByUser"] == {"id": "Maren", "name": "Maren"}
    assert [(one["text"], one["user"]["name"]) for one in row["comments"]] == [("Look at the second band.", "Maren")]


def test_an_explanation_by_a_model_is_told_from_a_persons(maren: TestClient) -> None:
    body = {"feature": {**OF, "index": "3", "explanation": "digits of years", "explanationModel": "gpt-4o-mini"}}
    said = post(maren, "explanation/new", body)
    assert said["url"].endswith(f"{SAE}/features/3")
    (label,) = maren.get(f"{SAE}/features/3/labels.json").json()["labels"]
    assert (label["text"], label["method"], label["author"]) == ("digits of years", "gpt-4o-mini", "Maren")
    maren.post(f"{SAE}/features/3/labels", data={"label": "years"})
    rows = maren.get(f"{FEATURE}/3").json()["explanations"]
    assert [row["description"] for row in rows] == ["years", "digits of years"], "a person's first"
    assert rows[1]["explanationModelName"] == "gpt-4o-mini"


def test_explanations_are_found_by_their_words_the_nearest_first(maren: TestClient) -> None:
    for index, text in (
        (3, "golden retrievers"),
        (4, "dogs, golden ones"),
        (5, "silver"),
        (6, "A Golden Retriever and its owner"),
    ):
        post(maren, "explanation/new", {"feature": {**OF, "index": index, "explanation": text}})
    found = post(maren, "explanation/search", {**{"modelId": MODEL, "layers": [SOURCE]}, "query": "golden retriever"})
    assert [row["index"] for row in found["results"]] == ["3", "6", "4"]
    similar = [row["cosine_similarity"] for row in found["results"]]
    assert similar == sorted(similar, reverse=True)
    assert similar[0] == pytest.approx(1)
    assert (found["resultsCount"], found["hasMore"]) == (3, False)
    assert "nextOffset" not in found
    assert found["results"][0]["neuron"]["index"] == "3"
    assert len(found["results"][0]["neuron"]["activations"]) == 3
    by_model = post(maren, "explanation/search-model", {"modelId": MODEL, "query": "golden retriever"})
    assert (
        by_model["results"] == post(maren, "explanation/search-all", {"query": "golden retriever"})["results"] == found["results"]
    )
    assert post(maren, "explanation/search-all", {"query": "???"})["results"] == []


def test_a_search_goes_on_where_it_ended(maren: TestClient) -> None:
    features = [{"index": index, "explanations": [{"text": f"number {index}"}]} for index in range(25)]
    said = post(maren, "feature/upload-batch", {"modelId": MODEL, "source": SOURCE, "features": features})
    assert said == {"message": "25 explanations created."}
    first = post(maren, "explanation/search-all", {"query": "number"})
    assert (len(first["results"]), first["hasMore"], first["nextOffset"]) == (20, True, 20)
    rest = post(maren, "explanation/search-all", {"query": "number", "offset": 20})
    assert (len(rest["results"]), rest["hasMore"]) == (5, False)
    assert len({row["index"] for row in (*first["results"], *rest["results"])}) == 25


def test_an_upload_is_taken_whole_or_not_at_all(maren: TestClient) -> None:
    features = [{"index": 3, "explanations": [{"text": "one"}]}, {"index": 60, "explanations": [{"text": "two"}]}]
    body = {"modelId": MODEL, "source": SOURCE, "features": features}
    assert maren.post("/api/feature/upload-batch", json=body).status_code == 404
    assert maren.get(f"{FEATURE}/3").json()["explanations"] == []


def test_exports_are_elsewhere_as_neuronpedias_are(client: TestClient) -> None:
    response = client.get("/api/explanation/export")
    assert response.status_code == 400
    assert response.json()["newUrl"].endswith("/labels.json")


# ---- typed text ----

LIVE = (
    ("activation/new", {"feature": {**OF, "index": "3"}, "customText": "Hello world"}),
    ("activation/source", {**UP, "customText": ["Hello", "world"]}),
    ("search-all", {"modelId": MODEL, "sourceSet": "smollm2-l17", "text": "Hello world", "sortIndexes": None}),
    ("search-topk-by-token", {**UP, "text": "Hello world"}),
    ("steer", STEER),
)


@pytest.mark.parametrize(("path", "body"), LIVE)
def test_with_the_engine_away_typed_text_gets_a_sentence(client: TestClient, path: str, body: Any) -> None:
    response = client.post(f"/api/{path}/", json=body)
    assert response.status_code == 503
    assert "headscope engine" in response.json()["error"]


@pytest.fixture
def fires(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An engine that says: of 4 tokens, 3 fires with 2 on token 1 and 5 with 1, 3 with 1.5 and the dense 4 with 9 on token 2."""
    seen: list[Any] = []

    def codes(_: Live, question: TextQuestion) -> LiveCodes:
        seen.append(question)
        return LiveCodes(
            sae=question.sae, tokens=[0, 8, 9, 0], texts=["<s>", " a", " b", "<s>"], excluded=[True, False, False, True],
            positions=[1, 1, 2, 2], features=[3, 5, 3, 4], activations=[2.0, 1.0, 1.5, 9.0],
        )  # fmt: skip

    def sources(_: Live, question: SourcesQuestion) -> LiveSources:
        seen.append(question)
        return LiveSources(sae=question.sae, given=[[*at, 0, 0] for at in zip(question.features, question.dests, strict=True)])

    monkeypatch.setattr(Live, "codes", codes)
    monkeypatch.setattr(Live, "sources", sources)
    return seen


def densities(client: TestClient) -> dict[int, float]:
    """Of the features that fire."""
    return {index: client.get(f"{FEATURE}/{index}").json()["frac_nonzero"] for index in (3, 4, 5)}


def test_the_strongest_of_a_text_come_with_their_sources_and_neurons(client: TestClient, fires: list[Any]) -> None:
    body = {"modelId": MODEL, "sourceSet": "smollm2-l17", "text": "a b", "selectedLayers": [SOURCE], "sortIndexes": []}
    found = post(client, "search-all", body)
    assert found["tokens"] == ["<s>", " a", " b", "<s>"]
    assert [(row["index"], row["maxValue"], row["maxValueIndex"]) for row in found["result"]] == [
        ("4", 9, 2),
        ("3", 2, 1),
        ("5", 1, 1),
    ]
    assert [row["values"] for row in found["result"]] == [[0, 0, 9, 0], [0, 2, 1.5, 0], [0, 1, 0, 0]]
    assert [row["dfaValues"] for row in found["result"]] == [[4, 2, 0, 0], [3, 1, 0, 0], [5, 1, 0, 0]]
    assert [(row["dfaTargetIndex"], row["dfaMaxValue"]) for row in found["result"]] == [(2, 4), (1, 3), (1, 5)]
    assert [len(row["neuron"]["activations"]) for row in found["result"]] == [1, 1, 1]
    assert found["result"][0]["neuron"]["model"]["id"] == MODEL
    assert [type(one) for one in fires] == [TextQuestion, SourcesQuestion], "one question for all of them"
    assert fires[1].tokens == [0, 8, 9, 0], "of the very same tokens"


def test_results_can_be_sorted_by_tokens_and_kept_from_being_dense(client: TestClient, fires: list[Any]) -> None:
    body = {"modelId": MODEL, "sourceSet": "smollm2-l17", "text": ["a b", "a b"], "sortIndexes": [1, 2]}
    one, other = post(client, "search-all", body)["results"]
    assert one["result"] == other["result"]
    assert [(row["index"], row["neuron"]) for row in one["result"]] == [("4", None), ("3", None), ("5", None)]
    assert [row["index"] for row in post(client, "search-all", {**body, "sortIndexes": [1]})["results"][0]["result"]] == [
        "3",
        "5",
    ]
    known = densities(client)
    threshold = sorted(known.values())[1]
    few = post(client, "search-all", {**body, "densityThreshold": threshold, "numResults": 2})["results"][0]["result"]
    assert {int(row["index"]) for row in few} == {index for index, density in known.items() if density <= threshold}
    assert len(fires) > 4


@pytest.mark.usefixtures("fires")
def test_the_strongest_of_each_token_leave_the_row_start_out(client: TestClient) -> None:
    found = post(client, "search-topk-by-token", {**UP, "text": "a b", "densityThreshold": 0})
    assert found["source"] == SOURCE
    assert [(row["position"], row["token"], row["isSpecial"]) for row in found["results"]] == [(1, " a", False), (2, " b", False)]
    shown = [[(one["featureIndex"], one["activationValue"]) for one in row["topFeatures"]] for row in found["results"]]
    assert shown == [[(3, 2), (5, 1)], [(4, 9), (3, 1.5)]]
    assert found["results"][0]["topFeatures"][0]["feature"]["index"] == "3"
    whole = post(client, "search-topk-by-token", {**UP, "text": ["a b"], "ignoreBos": False, "numResults": 1})["results"][0][
        "results"
    ]
    assert [(row["isSpecial"], len(row["topFeatures"])) for row in whole][::3] == [(True, 0), (True, 0)]
    sparse = {index for index, density in densities(client).items() if density <= 0.01}
    assert {
        one["featureIndex"]
        for row in post(client, "search-topk-by-token", {**UP, "text": "a b"})["results"]
        for one in row["topFeatures"]
    } == sparse


@pytest.mark.usefixtures("fires")
def test_all_that_fires_is_listed_by_feature(client: TestClient) -> None:
    (found,) = post(client, "activation/source", {**UP, "customText": "a b"})["results"]
    assert found == {
        "tokens": ["<s>", " a", " b", "<s>"],
        "activeFeatures": {"3": [[1, 2.0], [2, 1.5]], "5": [[1, 1.0]], "4": [[2, 9.0]]},
    }


def test_steering_gives_both_texts_with_the_prompt(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SteerQuestion] = []

    def steered(_: Live, question: SteerQuestion) -> LiveSteered:
        asked.append(question)
        plain, changed = {"tokens": [1], "text": " is"}, {"tokens": [2], "text": " came"}
        none = {
            name: [] for name in ("tokens", "texts", "losses", "changed_losses", "kl", "likely", "reached", "asked", "features")
        }
        return LiveSteered.model_validate({"model": MODEL, **none, "look": 0, "n_reached": 0, "plain": plain, "changed": changed})

    monkeypatch.setattr(Live, "steer", steered)
    found = post(
        client, "steer", {**STEER, "n_tokens": 5, "temperature": 0.5, "seed": 16, "strength_multiplier": 2, "freq_penalty": 1}
    )
    assert found == {
        "STEERED": "The tide came", "DEFAULT": "The tide is", "steeredLogProbs": None, "defaultLogProbs": None, "id": "",
        "shareUrl": None, "limit": None,
    }  # fmt: skip
    feature = FeatureChanged(sae="smollm2-l17", index=3, how="steer", value=8.0)
    expected = SteerQuestion(features=[feature], text="The tide", most=0, new_tokens=5, temperature=0.5, seed=16)
    assert asked == [expected]
