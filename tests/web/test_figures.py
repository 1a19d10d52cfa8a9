"""Every chart as a file of its own: SVG that stands alone, CSV with the numbers in full."""

import csv
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.figures import SCHEMES, mixed, palette, style
from tests.web.conftest import SAE
from tests.web.reading import Reader

PAGES = ("/", SAE, f"{SAE}/features/3", f"{SAE}/heads/4", "/jobs/train-running-1")
SVG = "{http://www.w3.org/2000/svg}"


def files(client: TestClient, path: str) -> list[str]:
    return [a["href"] for a in Reader(client.get(path).text).all("a") if "download" in a and "figure=" in a["href"]]


@pytest.mark.parametrize("path", PAGES)
def test_every_chart_of_a_page_is_there_as_svg_and_csv(client: TestClient, path: str) -> None:
    page = client.get(path).text
    links = files(client, path)
    assert len(links) == 2 * page.count("<figure") > 0
    assert len(set(links)) == len(links)
    for link in links:
        answer = client.get(path + link)
        assert answer.status_code == 200, link
        if link.endswith("svg"):
            root = ET.fromstring(answer.text)
            assert answer.headers["content-type"].startswith("image/svg+xml")
            assert root.find(f"{SVG}title").text in Reader(page).text  # type: ignore[union-attr,operator]
        else:
            rows = list(csv.reader(io.StringIO(answer.text)))
            assert len(rows) > 1
            assert {len(row) for row in rows} == {len(rows[0])}


def test_a_csv_has_the_numbers_in_full(client: TestClient) -> None:
    page = client.get(f"{SAE}.json").json()["overview"]
    answer = client.get(f"{SAE}?figure=loss.csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(float(row["step"]), float(row["loss"])) for row in rows] == [(p["step"], p["values"]["loss"]) for p in page["curve"]]
    assert 'filename="loss.csv"' in answer.headers["content-disposition"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_has_its_own_colours_and_needs_no_style_sheet(client: TestClient, scheme: str) -> None:
    text = client.get(f"{SAE}?figure=features-by-their-leading-head.svg&scheme={scheme}").text
    assert palette(scheme)["bar"] in text
    assert palette(scheme)["card"] in text
    for unknown in ("var(", "light-dark(", "color-mix(", "class=chosen"):
        assert unknown not in text
    other = next(name for name in SCHEMES if name != scheme)
    assert palette(other)["bar"] not in text


def test_every_class_that_a_chart_draws_with_has_a_rule_in_the_file() -> None:
    drawn = set(re.findall(r'class="([a-z][\w -]*)"', Path("server/charts.py").read_text()))
    names = {name for classes in drawn for name in classes.split()} - {"bar", "mark-key", "map-key", "marks", "scatter", "quiet"}
    assert {"axis", "line", "mark", "void"} <= names
    assert [name for name in sorted(names) if f".{name}" not in style("light")] == []


def test_colours_are_mixed_by_share() -> None:
    assert mixed("#ff0000", "#0000ff", 1) == "#ff0000"
    assert mixed("#ff0000", "#0000ff", 0.5) == "#800080"


def test_a_figures_address_keeps_what_the_page_was_asked(client: TestClient) -> None:
    assert all("head=2" in link for link in files(client, f"{SAE}/features/3?head=2"))
    assert all("scheme" not in link for link in files(client, f"{SAE}/features/3?scheme=dark"))


def test_a_figure_that_is_not_there_gets_a_sentence(client: TestClient) -> None:
    answer = client.get(f"{SAE}?figure=nothing.svg")
    assert answer.status_code == 404
    assert "no figure called" in answer.text
    assert "loss.svg" in answer.text
    assert client.get(f"{SAE}?figure=loss.svg&scheme=red").status_code == 422
