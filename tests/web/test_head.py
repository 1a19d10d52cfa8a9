"""A head's page, and the table of every head of a model."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from server.app import create_app
from server.db import Database
from server.store.heads import DISTANCES
from server.tables import Feature, Harvest, HeadSummary, Model, Study
from tests.web.conftest import SAE, at, put
from tests.web.factory import Shape, add_sae
from tests.web.reading import Reader

HEAD = f"{SAE}/heads/4"
MODEL = "/models/smollm2-135m/heads"


def test_a_head_lists_its_features_by_both_shares_largest_first(client: TestClient) -> None:
    page = client.get(f"{HEAD}.json").json()
    for rows, share in ((page["by_weights"], "head_share"), (page["by_data"], "dfa_share")):
        assert len(rows) == 10
        assert [row[share] for row in rows] == sorted((row[share] for row in rows), reverse=True)
        assert all(row["n_fired"] for row in rows)
    table = client.get(f"{SAE}.json?head=4&dead=false&limit=10").json()["table"]["rows"]
    assert [row["index"] for row in page["by_weights"]] == [row["index"] for row in table]


def test_where_a_head_looks_is_summed_from_its_own_entries(client: TestClient) -> None:
    page = client.get(f"{HEAD}.json").json()
    by_distance, counted = np.zeros(len(DISTANCES) - 1), 0
    for index in {row["index"] for row in page["by_weights"] + page["by_data"]}:
        for example in client.get(f"{SAE}/features/{index}.json").json()["examples"]:
            mine = [(example["dest"] - e["src"], abs(e["value"])) for e in example["dfa"] if e["head"] == 4]
            if example["band"] == 0 and mine:
                total = sum(size for _, size in mine)
                by_distance += np.histogram([d for d, _ in mine], DISTANCES, weights=[size / total for _, size in mine])[0]
                counted += 1
    assert page["n_examples"] == counted > 10
    shown = np.zeros_like(by_distance)
    for i, span in enumerate(page["sources"]):
        assert (span["low"], span["high"]) == (DISTANCES[i], DISTANCES[i + 1])
        shown[i] = span["value"]
    np.testing.assert_allclose(shown, 100 * by_distance / counted, rtol=1e-6)
    assert shown.sum() == pytest.approx(100)


def test_the_page_compares_the_head_with_those_of_its_layer(client: TestClient) -> None:
    shown = client.get(HEAD).text
    here = re.findall(r'<tr class="here">.*?</tr>|<tr class="here">(?:(?!<tr).)*', shown, re.S)
    assert len(here) == 1
    assert '<b aria-current="page">4</b>' in here[0]
    links = [a["href"] for a in Reader(shown).all("a")]
    assert {f"{SAE}/heads/{head}" for head in range(9) if head != 4} <= set(links)
    text = Reader(shown).text
    assert "40\u202f% by a common family" in text
    for target in {link.split("#")[0] for link in links if link.startswith("/")}:
        assert client.get(target).status_code in (200, 303), target


def test_a_head_that_is_not_there_is_refused_with_a_sentence(client: TestClient) -> None:
    answer = client.get(f"{SAE}/heads/9")
    assert answer.status_code == 422
    assert "has heads 0 to 8" in answer.text
    assert client.get("/models/nothing/heads").status_code == 404


def test_pages_lead_to_the_head(client: TestClient) -> None:
    assert f'href="{SAE}/heads/4"' in client.get(SAE).text
    assert f'href="{SAE}/heads/' in client.get(f"{SAE}/features/3").text


def test_what_a_study_found_of_the_head_is_said(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=12, n_dead=1))
    found = {"layer": 17, "head": 4, "role": "short-prefix", "best": 0.81, "previous": 0.02, "duplicate": 0.11}
    database = Database(settings.url)
    with database.write() as session:
        model = session.scalars(sa.select(Model)).one()
        study = {"job_id": "s", "kind": "induction", "title": "Heads", "model_id": model.id, "config": {}}
        session.add(Study(**study, result={"summary": "", "heads": [found]}))
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        assert client.get(f"{HEAD}.json").json()["studied"]["role"] == "short-prefix"
        assert "/studies/1?heads=17.4" in client.get(HEAD).text
        assert client.get(f"{SAE}/heads/3.json").json()["studied"] is None


def test_the_table_of_every_head_takes_the_newest_sae_of_each_layer(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=12, n_dead=1))
    database = Database(settings.url)
    with database.write() as session:
        for sae, layer in (("older-l3", 3), ("newer-l3", 3)):
            add_sae(session, Shape(n_features=12, n_dead=1, sae=sae, layer=layer, running_job=False))
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        heads = client.get(f"{MODEL}.json").json()["heads"]
        assert [(one["layer"], one["sae"]) for one in heads[::9]] == [(3, "newer-l3"), (17, "smollm2-l17")]
        by_data = [
            int(n)
            for n in re.findall(
                r"sort=-dfa_share#features\">(\d+)</a>\s*<td class=\"n\"><a", client.get(f"{MODEL}?sort=data").text
            )
        ]
        assert by_data == sorted(by_data, reverse=True)
        rows = list(csv.DictReader(io.StringIO(client.get(f"{MODEL}.csv").text)))
        assert [(row["layer"], row["head"]) for row in rows] == [
            (str(layer), str(head)) for layer in (3, 17) for head in range(9)
        ]
        assert (rows[4]["leads_by_data"], rows[4]["main_family"], rows[4]["directions"]) == ("12", "induction", "0.9")
        assert rows[0]["directions"] == ""
        assert "attachment" in client.get(f"{MODEL}.csv").headers["content-disposition"]


def test_what_cannot_be_said_yet_is_said(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=12, n_dead=1))
    database = Database(settings.url)
    with database.write() as session:
        session.execute(sa.delete(HeadSummary))
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        assert "made before heads were summarised" in client.get(HEAD).text
        assert "harvest its SAEs again" in client.get(MODEL).text
    with database.write() as session:
        session.execute(sa.text("update sae set harvest_id = null"))
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        assert client.get(HEAD).status_code == 404
        assert "no published harvest yet" in client.get(HEAD).text
        assert "No SAE of this model has a published harvest" in client.get(MODEL).text


def test_an_imported_harvest_says_what_is_not_known_of_a_head(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=12, n_dead=1))
    database = Database(settings.url)
    with database.write() as session:
        session.execute(sa.delete(HeadSummary))
        session.execute(
            sa.update(Harvest).values(source={"format": "SAEDashboard", "path": "x", "dfa": "none", "lacks": ["families"]})
        )
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        said = Reader(client.get(HEAD).text).text
        links = Reader(client.get(f"{SAE}/features/3").text).all("a")
    assert "Not known: families" in said
    assert "It leads no live feature" not in said
    assert "Its features by data" not in said
    assert "imported from SAEDashboard files" in said
    assert not [link for link in links if link.get("data-head") == "all"], "there is nothing to repaint by"


def test_a_family_that_nobody_looked_for_is_not_called_unclear(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=12, n_dead=1))
    database = Database(settings.url)
    source = {"format": "SAEDashboard", "path": "x", "dfa": "none", "lacks": ["families"]}
    for known, word in ((None, "unclear"), (source, "–")):
        with database.write() as session:
            session.execute(sa.update(Feature).values(family=None))
            session.execute(sa.update(Harvest).values(source=known))
        with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
            for path in (SAE, HEAD):
                cells = re.findall(r'<td class="kind"[^>]*>(–|unclear)', client.get(path).text)
                assert set(cells) == {word}, path
            part = client.get(SAE, headers={"HX-Request": "true", "HX-Request-Type": "partial"}).text
            assert part.count(f">{word}<td") == 11, "each live feature; a dead one has nothing there"
            for path in (f"{SAE}/features/3", f"/embed{SAE}/features/3"):
                assert f"<dt>family</dt><dd>{word}</dd>" in client.get(path).text
    database.close()
