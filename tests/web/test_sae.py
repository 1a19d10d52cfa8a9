"""`/saes/{sae}`: the overview and the feature table."""

import csv
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from server.app import create_app
from server.db import Database
from server.pages import csv_file
from server.pages.reply import to_json
from server.pages.sae import SaePage
from server.settings import Settings
from server.store.features import SORT_KEYS, FeatureQuery, feature_table
from server.store.heads import head_summaries
from server.store.labels import lists_of
from server.store.saes import find_sae, sae_overview
from server.tables import HeadSummary
from tests.web.conftest import SAE, at, put
from tests.web.factory import Shape
from tests.web.reading import PART, Reader

SORTS = [sign + key for key in SORT_KEYS for sign in ("", "-")]


def walk(client: TestClient, query: str) -> list[dict[str, Any]]:
    """Every row of the table, page after page."""
    rows: list[dict[str, Any]] = []
    after = ""
    while True:
        table = client.get(f"{SAE}.json?{query}{after}").json()["table"]
        rows += table["rows"]
        if table["next"] is None:
            return rows
        after = f"&after={quote(table['next'])}"
        assert len(rows) <= 60, "the pages never end"


@pytest.mark.parametrize("head", [None, 4])
@pytest.mark.parametrize("sort", SORTS)
def test_every_sort_visits_every_feature_once_and_in_order(client: TestClient, sort: str, head: int | None) -> None:
    rows = walk(client, f"limit=7&sort={sort}" + (f"&head={head}" if head is not None else ""))
    assert sorted(row["index"] for row in rows) == list(range(60))
    names = {"idx": "index", "max": "max_act", "mean": "mean_act"}
    values = [row[names.get(sort.removeprefix("-"), sort.removeprefix("-"))] for row in rows]
    known = [value for value in values if value is not None]
    assert values == known + [None] * (len(values) - len(known)), "what is missing comes last"
    assert known == sorted(known, reverse=sort.startswith("-"))


def test_a_page_of_one_row_still_ends(client: TestClient) -> None:
    assert len(walk(client, "limit=1&sort=-distance")) == 60


def test_a_head_sorts_by_its_own_share(client: TestClient) -> None:
    rows = client.get(f"{SAE}.json?head=4").json()["table"]["rows"]
    assert {row["head"] for row in rows} == {4}
    assert all(a["head_share"] >= b["head_share"] for a, b in pairwise(rows))
    shares = client.get(f"{SAE}/features/{rows[0]['index']}.json").json()["heads"]
    assert rows[0]["head_share"] == pytest.approx(shares[4]["norm_share"])
    assert rows[0]["dfa"] == pytest.approx(shares[4]["dfa"], rel=1e-5)


def test_filters_keep_what_they_say(client: TestClient) -> None:
    everything = walk(client, "sort=idx")

    def kept(query: str) -> list[int]:
        return [row["index"] for row in walk(client, f"sort=idx&{query}")]

    assert kept("min_density=0.001") == [r["index"] for r in everything if r["density"] >= 0.001]
    assert kept("max_density=0.001") == [r["index"] for r in everything if r["density"] <= 0.001]
    assert kept("min_max=8") == [r["index"] for r in everything if r["max_act"] >= 8]
    assert kept("dead=true") == [r["index"] for r in everything if r["n_fired"] == 0] != []
    assert kept("dead=false") == [r["index"] for r in everything if r["n_fired"] > 0]
    assert kept("family=induction") == [r["index"] for r in everything if r["family"] == "induction"] != []
    assert kept("family=unclear") == [r["index"] for r in everything if r["family"] is None] != []
    assert kept("head=2&leads=true") == [r["index"] for r in everything if r["head"] == 2] != []


def test_the_number_matching_is_that_of_all_pages(client: TestClient) -> None:
    first = client.get(f"{SAE}.json?limit=5&family=local&dead=false").json()["table"]
    second = client.get(f"{SAE}.json?limit=5&family=local&dead=false&after={first['next']}").json()["table"]
    assert first["n_matching"] == second["n_matching"] == len(walk(client, "family=local&dead=false"))


def test_empty_fields_of_the_form_filter_nothing(client: TestClient) -> None:
    answer = client.get(f"{SAE}.json?min_density=&max_density=&min_max=&family=&dead=&sort=-max")
    assert answer.json()["table"]["n_matching"] == 60


def test_a_filter_that_fits_nothing_says_so(client: TestClient) -> None:
    assert "No feature is like that." in client.get(f"{SAE}?min_max=1000").text


def test_the_home_map_and_the_head_chart_lead_to_as_many_features_as_they_say(client: TestClient) -> None:
    for cell in client.get("/index.json").json()["models"][0]["cells"]:
        rows = walk(client, f"head={cell['head']}&leads=true&dead=false")
        assert len(rows) == cell["features"]
    overview = client.get(f"{SAE}.json").json()["overview"]
    assert sum(count["features"] for count in overview["led_by_head"]) == 60 - overview["dead"]


def test_the_density_histogram_counts_every_live_feature(client: TestClient) -> None:
    overview = client.get(f"{SAE}.json").json()["overview"]
    assert sum(b["count"] for b in overview["density"]) == overview["sae"]["harvest"]["n_live"]
    rows = walk(client, "dead=false")
    for b in overview["density"][1:]:
        assert b["count"] == sum(b["low"] <= row["density"] < b["high"] for row in rows)


def test_htmx_gets_the_table_alone_and_the_canonical_address(client: TestClient) -> None:
    part = client.get(f"{SAE}?min_density=&sort=-max&head=3&limit=50", headers=PART)
    assert "<html" not in part.text
    assert part.headers["hx-push-url"] == f"{SAE}?sort=-max&head=3"
    assert part.text.strip() in client.get(f"{SAE}?sort=-max&head=3").text


def test_links_of_the_table_keep_the_filters_and_start_again_at_the_first_page(client: TestClient) -> None:
    table = client.get(f"{SAE}.json?limit=5&family=local").json()["table"]
    page = Reader(client.get(f"{SAE}?limit=5&family=local&after={table['next']}").text)
    sort = next(a["href"] for a in page.all("a") if "sort=-mean" in a["href"])
    assert "family=local" in sort
    assert "limit=5" in sort
    assert "after" not in sort


def test_the_sorted_column_is_announced(client: TestClient) -> None:
    sorted_by = [th for th in Reader(client.get(f"{SAE}?sort=mean").text).all("th") if "aria-sort" in th]
    assert [th["aria-sort"] for th in sorted_by] == ["ascending"]


def test_metrics_are_sentences_and_a_withheld_one_says_why(client: TestClient) -> None:
    text = Reader(client.get(SAE).text).text
    assert "24.3" in text
    assert "this share is missing from the reconstruction" in text
    assert "not known" in text
    assert "mean ablation moves the loss by 0.014 nats" in text


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"reconstruction": {"fvu": 0.2}},
        {"prose": {"clean": 3.0}},
        {"repeated": {"clean": 1.0, "recovered_zero": 0.9, "zero": 2.0}},
    ],
)
def test_metrics_that_are_missing_do_not_break_the_page(tmp_path: Path, metrics: dict[str, Any]) -> None:
    settings = put(at(tmp_path), Shape(n_features=12, n_dead=1, metrics=metrics))
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        assert client.get(SAE).status_code == 200
        assert client.get("/").status_code == 200


def test_an_sae_without_a_harvest_tells_how_its_harvest_goes(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=12, n_dead=1))
    database = Database(settings.url)
    with database.write() as session:
        session.execute(sa.text("update sae set harvest_id = null"))
        session.execute(
            sa.text(
                "insert into job (id, kind, title, config, status, attempt, phase, done, total, unit, rate, created_at) values "
                "('harvest-smollm2-l17', 'harvest', 'H', '{}', 'running', 1, 'scan', 1, 2, 'rows', 0, '2026-11-20 10:00:00')"
            )
        )
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        page = client.get(SAE)
        assert "etag" not in page.headers
        assert '<a href="/jobs/harvest-smollm2-l17">scan</a>' in page.text
        assert client.get(f"{SAE}.json").json()["table"]["rows"] == []
        assert "no published harvest yet" in client.get(f"{SAE}/features/1").text
        assert client.get(f"{SAE}/features/1").status_code == 404
        assert client.get(f"{SAE}/random").status_code == 404
        assert "no published harvest yet" in client.get("/").text


def test_the_json_is_the_same_dataclass(client: TestClient, filled: Settings) -> None:
    database = Database(filled.url)
    with database.read() as session:
        door = find_sae(session, "smollm2-l17")
        page = SaePage(
            sae_overview(session, door),
            head_summaries(session, door),
            feature_table(session, door, FeatureQuery(head=2, limit=9)),
            lists_of(session, door.id),
        )
    database.close()
    assert client.get(f"{SAE}.json?head=2&limit=9").content == to_json(page)


def test_a_row_shows_its_destination_and_strongest_source(client: TestClient) -> None:
    row = client.get(f"{SAE}.json?limit=1").json()["table"]["rows"][0]
    example = client.get(f"{SAE}/features/{row['index']}.json").json()["examples"][0]
    by_source: dict[int, float] = {}
    for entry in example["dfa"]:
        by_source[entry["src"]] = by_source.get(entry["src"], 0) + entry["value"]
    strongest = max(by_source, key=lambda src: by_source[src])
    assert row["snippet"]["token"] == example["texts"][example["dest"]]
    assert row["snippet"]["source"] == example["texts"][strongest]
    assert row["snippet"]["source_offset"] == strongest - example["dest"]
    assert re.search(r'class="kwic"', client.get(SAE).text)


def test_every_head_has_a_line_that_leads_to_its_features(client: TestClient) -> None:
    heads = client.get(f"{SAE}.json").json()["heads"]
    assert [line["head"] for line in heads] == list(range(9))
    assert (heads[4]["n_led"], heads[4]["polysemantic"]) == (12, 0.4)
    assert heads[4]["n_led_norm"] == len(walk(client, "head=4&leads=true&dead=false"))
    assert heads[4]["families"] == [{"key": "induction", "features": 8}, {"key": "unclear", "features": 4}]
    assert heads[0]["diversity"] is None
    shown = client.get(SAE).text
    part = shown[shown.index('class="head-lines"') :]
    part = part[: part.index("</table>")]
    assert f'href="{SAE}?head=4&amp;leads=true#features"' in part
    assert f'href="{SAE}?head=4&amp;sort=-dfa_share#features"' in part
    assert f'href="{SAE}/features/5"' in part
    for target in set(re.findall(r'href="([^"#]+)', part)):
        assert client.get(target.replace("&amp;", "&")).status_code == 200, target


def test_an_sae_whose_harvest_knows_no_heads_shows_no_table_of_them(tmp_path: Path) -> None:
    settings = put(at(tmp_path))
    database = Database(settings.url)
    with database.write() as session:
        session.execute(sa.delete(HeadSummary))
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        assert client.get(f"{SAE}.json").json()["heads"] == []
        assert "head-lines" not in client.get(SAE).text


def test_the_table_says_the_verdict_of_each_family(client: TestClient) -> None:
    shown = client.get(f"{SAE}?family=induction").text
    assert 'title="&#39; board&#39; is next by induction"' in shown


def test_a_file_holds_what_the_table_selects_in_its_order(client: TestClient) -> None:
    answer = client.get(f"{SAE}/features.csv?sort=-density&dead=false&min_max=3")
    assert answer.headers["content-disposition"] == 'attachment; filename="smollm2-l17-features.csv"'
    lines = list(csv.DictReader(answer.text.splitlines()))
    rows = walk(client, "sort=-density&dead=false&min_max=3")
    assert [int(line["index"]) for line in lines] == [row["index"] for row in rows] != []
    assert float(lines[0]["fires on"]) == rows[0]["density"]
    assert client.get(f"{SAE}/features.csv?head=99").status_code == 422


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1"])
def test_no_token_is_a_formula_in_a_spreadsheet(text: str) -> None:
    assert csv_file.cell(text) == f"'{text}"
    assert csv_file.cell("a=1") == "a=1"
    assert csv_file.cell(-1.5) == -1.5


def test_next_previous_and_random_keep_to_what_the_table_selected(client: TestClient) -> None:
    rows = [row["index"] for row in walk(client, "sort=-max&family=local")]
    page = Reader(client.get(f"{SAE}?sort=-max&family=local").text)
    first = next(a["href"] for a in page.all("a") if f"/features/{rows[0]}?" in a["href"])
    selected = quote("sort=-max&family=local")
    assert parse_qs(urlsplit(first).query)["from"] == ["sort=-max&family=local"]
    for here, there in pairwise(rows):
        assert (
            client.get(f"{SAE}/features/{here}/next?from={selected}").headers["location"].startswith(f"{SAE}/features/{there}?")
        )
        assert (
            client.get(f"{SAE}/features/{there}/previous?from={selected}")
            .headers["location"]
            .startswith(f"{SAE}/features/{here}?")
        )
    last = client.get(f"{SAE}/features/{rows[-1]}/next?from={selected}")
    assert last.status_code == 404
    assert "is the last of those" in last.text
    for _ in range(8):
        found = client.get(f"{SAE}/random?from={selected}").headers["location"]
        assert int(re.findall(r"/features/(\d+)", found)[0]) in rows
    assert client.get(f"{SAE}/features/3/next?from=sort%3Dcolour").status_code == 422


def test_the_table_goes_back_as_it_came(client: TestClient) -> None:
    first = client.get(f"{SAE}.json?limit=7&sort=distance").json()["table"]
    second = client.get(f"{SAE}.json?limit=7&sort=distance&after={quote(first['next'])}").json()["table"]
    back = client.get(f"{SAE}.json?limit=7&sort=distance&before={quote(second['previous'])}").json()["table"]
    assert [row["index"] for row in back["rows"]] == [row["index"] for row in first["rows"]]
    assert back["previous"] is None


def test_the_rank_spectrum_shows_the_flattest_and_the_steepest_head(client: TestClient) -> None:
    page = client.get(SAE).text
    assert "Directions used at each head, of 4" in page
    drawn = page[page.index("Rank spectrum of the decoder") :]
    drawn = drawn[: drawn.index("</figure>")]
    assert [name for name in ("head 4,", "head 1,", "head 6,") if name in drawn] == ["head 4,", "head 1,", "head 6,"]
    assert "head 5," not in drawn
