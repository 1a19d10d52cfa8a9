"""Every chart as a file of its own: SVG that stands alone, CSV with the numbers in full."""

import csv
import io
import re
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from server.figures import SCHEMES, marks, mixed, palette, style
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


SEEN = {
    "trichromat": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What people see of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1."""
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
"""Of linear sRGB, IEC 61966-2-1."""


def lab(colour: str, eye: str) -> np.ndarray:
    """CIELAB of a colour as an eye sees it, in which a distance of about 2 is just seen."""
    code = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    share = XYZ @ np.clip(np.array(SEEN[eye]) @ linear, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("eye", SEEN)
def test_colours_that_mean_something_differ_whoever_looks(eye: str, scheme: str) -> None:
    series = [lab(colour, eye) for colour in marks(scheme)]
    assert len(series) == 6
    assert min(np.linalg.norm(a - b) for a, b in combinations(series, 2)) > 25  # each has a shape besides
    warm, pos, neg, card = (lab(palette(scheme)[name], eye) for name in ("warm", "pos", "neg", "card"))
    # Of text, signs are drawn as an even and as a dotted bar, so they need less than the ground under them.
    assert min(np.linalg.norm(a - b) for a, b in combinations((warm, pos, neg), 2)) > 18
    assert min(np.linalg.norm(a - card) for a in (warm, pos, neg)) > 50
