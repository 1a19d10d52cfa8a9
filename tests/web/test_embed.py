"""A feature as a card for frames, its picture for chats, and how a page is cited."""

import re
import struct
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.app import create_app
from server.db import Database
from server.panels import bibtex
from server.preview import HEIGHT, WIDTH, feature_svg, png
from server.store.features import feature_page
from server.store.saes import find_sae
from tests.web.conftest import SAE, at, put
from tests.web.factory import Shape
from tests.web.reading import Reader

CARD = f"/embed{SAE}/features/3"
HOSTILE = (
    "\u202eevil",
    "</text><script>x</script>",
    "a" * 500,
    " \ud83d".encode("utf-8", "replace").decode(),
    "\x00",
    "<0xF0>",
    "日本",
    "&amp;",
)


def pixels(picture: bytes) -> tuple[int, int, int]:
    """Width, height and number of distinct rows of a PNG."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    data, place = b"", 8
    while place < len(picture):
        (size,) = struct.unpack(">I", picture[place : place + 4])
        if picture[place + 4 : place + 8] == b"IDAT":
            data += picture[place + 8 : place + 8 + size]
        place += size + 12
    raw = zlib.decompress(data)
    row = len(raw) // height
    return width, height, len({raw[i * row + 1 : (i + 1) * row] for i in range(height)})


def test_a_card_may_be_framed_and_no_other_page_may(client: TestClient) -> None:
    rules = client.get(CARD).headers["content-security-policy"]
    assert "frame-ancestors" not in rules
    assert "script-src" not in rules
    assert "default-src 'none'" in rules
    assert client.get(CARD).headers["cross-origin-resource-policy"] == "cross-origin"
    for path in (f"{SAE}/features/3", "/", "/embed/nothing"):
        assert "frame-ancestors 'none'" in client.get(path).headers["content-security-policy"]


def test_a_card_has_no_script_no_form_and_leads_out_of_the_frame(client: TestClient) -> None:
    page = Reader(client.get(CARD).text)
    assert not page.all("script")
    assert not page.all("form")
    assert all(a.get("target") == "_blank" for a in page.all("a") if "figure=" not in a["href"])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_card_has_the_theme_that_was_asked_for(client: TestClient, theme: str) -> None:
    assert Reader(client.get(f"{CARD}?theme={theme}").text).all("html")[0]["data-theme"] == theme
    assert "data-theme" not in Reader(client.get(CARD).text).all("html")[0]


def test_a_card_shows_the_panels_that_were_asked_for(client: TestClient) -> None:
    text = Reader(client.get(f"{CARD}?panels=heads,examples&n=2").text)
    assert "by weights" in text.text
    assert "promoted" not in text.text
    assert len([li for li in text.all("li") if li.get("class") == "example"]) == 2
    assert "promoted" in client.get(f"{CARD}?panels=tokens").text
    refused = client.get(f"{CARD}?panels=heads,wings")
    assert refused.status_code == 422
    assert "is no panel" in refused.text


def test_a_link_in_a_chat_has_a_picture(client: TestClient) -> None:
    said = {meta.get("property"): meta.get("content") for meta in Reader(client.get(f"{SAE}/features/5").text).all("meta")}
    assert said["og:title"] == "Feature 5 of smollm2-l17"
    assert said["og:url"] == f"http://127.0.0.1:8000{SAE}/features/5"
    picture = client.get(str(said["og:image"]))
    assert picture.headers["content-type"] == "image/png"
    width, height, rows = pixels(picture.content)
    assert (width, height) == (WIDTH, HEIGHT)
    assert rows > 60, "there is something on it"
    tag = picture.headers["etag"]
    assert client.get(str(said["og:image"]), headers={"If-None-Match": tag}).status_code == 304


def test_the_picture_has_letters_where_the_machine_has_no_font() -> None:
    size = 'viewBox="0 0 200 40" width="200" height="40"'
    empty = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="200" height="40"/>{{}}</svg>'
    *_, without = pixels(png(empty.format("")))
    *_, with_text = pixels(png(empty.format('<text x="4" y="30" font-size="24" fill="#fff">Feature</text>')))
    assert without <= 2, "rows are stored by how they differ from the one above"
    assert with_text > 10


def test_hostile_tokens_are_harmless_on_picture_and_card(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=12, n_dead=1, vocabulary=HOSTILE))
    database = Database(settings.url)
    with database.read() as session:
        door = find_sae(session, "smollm2-l17")
        for index in range(12):
            drawn = feature_svg(feature_page(session, door, index))
            assert {element.tag.split("}")[1] for element in ET.fromstring(drawn).iter()} <= {"svg", "rect", "text", "tspan"}
            assert "\u202e" not in drawn
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        assert client.get(f"{SAE}/features/3/preview.png").status_code == 200
        assert "<script>x" not in client.get(CARD).text
        assert client.get(f"{SAE}/features/7/preview.png").status_code == 200  # a dead one


@pytest.mark.parametrize("path", [SAE, f"{SAE}/features/3", f"{SAE}/heads/2"])
def test_a_page_cites_itself(client: TestClient, path: str) -> None:
    text = Reader(client.get(path).text).text
    entry = text[text.index("@misc") :]
    assert f"\\url{{http://127.0.0.1:8000{path}}}" in entry
    assert "sha256 " + "00" * 32 in entry
    assert "harvest 1" in entry
    assert "year = {2026}" in entry


def test_a_citation_holds_nothing_that_tex_would_run() -> None:
    class Sae:
        name, model, sha256 = "a_b{c}", "x\\input%", "ff"

    entry = bibtex("50% of #1", "http://h/a_b", Sae(), None, None, "1")
    assert "50\\% of \\#1" in entry
    assert "a\\_b\\{c\\}" in entry
    assert "\\input" not in entry
    assert re.search(r"\\url\{http://h/a_b\}", entry)
