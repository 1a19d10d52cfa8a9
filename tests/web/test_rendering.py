"""Token texts and charts: whatever a tokenizer holds must come out as text."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from server.app import create_app
from server.charts import Bar, Curve, HeadCell, bar_chart, head_map, line_chart
from server.markup import escaped, token_chip, token_text
from server.rendering import Paint, example_tokens, level, num, percent, signed
from server.store.features import DfaEntry, FeatureExample
from tests.web.conftest import SAE, at, put
from tests.web.factory import Shape
from tests.web.reading import PART, Reader

HOSTILE = [
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onclick='x",
    "</span></p>",
    "<!--",
    "]]>",
    "<style>*{}</style>",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "\u202eevil",
    "\u200b",
    "\x00",
    "\x1b[31m",
    "\ud7ff",
    "\n",
    "\r\n",
    "\t",
    "\u2028",
    " ",
    "   ",
    "",
    "ö",
    "日本",
    "🙂",
    "\ufffd",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    folder: Path = tmp_path_factory.mktemp("hostile")
    shape = Shape(n_features=20, n_dead=2, vocabulary=HOSTILE)
    return TestClient(create_app(put(at(folder), shape)), base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize("address", [SAE, *(f"{SAE}/features/{i}?context=full" for i in range(4))])
@pytest.mark.parametrize("headers", [{}, PART], ids=["whole", "part"])
def test_hostile_tokens_stay_text(hostile: TestClient, address: str, headers: dict[str, str]) -> None:
    answer = hostile.get(address, headers=headers)
    assert answer.status_code == 200
    page = Reader(answer.text)
    assert page.refused == []
    assert not page.all("img")
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert not {"\u202e", "\u200b", "\x00", "\x1b", "\u2028"} & set(answer.text)


@given(st.text())
def test_any_token_comes_out_as_inert_text(text: str) -> None:
    for shown in (token_text(text), token_chip(text)):
        page = Reader(f"<p>{shown}</p>")
        assert {tag for tag, _ in page.elements} <= {"p", "i", "span"}
        assert page.refused == []


def test_an_ordinary_token_is_shown_as_it_is() -> None:
    assert token_text(" Hello") == " Hello"
    assert Reader(token_text("a\nb")).text == "a↵b"
    assert Reader(token_text("\u202e")).text == "⟨202E⟩"
    assert Reader(token_chip(" a b\n")).text == "·a·b↵"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (None, "–"), (float("nan"), "–"), (1.2345, "1.23"), (-0.00123, "−0.00123"), (123456, "123456"), (1e-7, "1.00e−7")],
)
def test_numbers_have_three_significant_digits_and_a_real_minus(value: float | None, text: str) -> None:
    assert num(value) == text


def test_signs_and_shares() -> None:
    assert signed(0.5) == "+0.500"
    assert signed(-0.5) == "−0.500"
    assert percent(0.1234).replace("\u202f", " ") == "12.3 %"


def test_a_level_never_hides_what_is_there_nor_leaves_the_scale() -> None:
    assert level(0, 1) == 0
    assert level(1e-9, 1) == 1
    assert level(1, 1) == 15
    assert level(5, 1) == 15
    assert level(1, 0) == 0


def test_a_chart_says_its_numbers_as_text_too() -> None:
    page = Reader(bar_chart("<Title>", [Bar("<a>", 3), Bar("b", 0.25, "/x?a=1&b=2")], desc="What & why"))
    assert page.all("svg")[0]["role"] == "group", "an image would hide the links in it"
    assert Reader(bar_chart("T", [Bar("a", 3)], desc="d")).all("svg")[0]["role"] == "img"
    assert [tag for tag, _ in page.elements if tag in ("title", "desc", "details", "table")][:2] == ["title", "desc"]
    assert "<a>" in page.text
    assert page.all("a")[0]["href"] == "/x?a=1&b=2"
    assert "0.2500" in page.text
    assert page.refused == []


def test_a_curve_draws_every_finite_point_once() -> None:
    points = [(0, 3.0), (1, float("nan")), (2, 2.0), (3, 1.0)]
    drawn = line_chart("Loss", Curve("loss", points), desc="d")
    path = Reader(drawn).all("polyline")[0]["points"].split()
    assert len(path) == 3
    heights = [float(point.split(",")[1]) for point in path]
    assert heights == sorted(heights), "a falling loss runs down the page"


def test_a_curve_without_points_says_so() -> None:
    assert "nothing to draw yet" in line_chart("Loss", Curve("loss", [(0, 1.0)]), desc="d")


def test_the_map_has_a_cell_for_every_head_and_links_where_something_was_read() -> None:
    cells = [HeadCell(2, head, 3 * head, (f"leads {3 * head}",), f"/saes/x?head={head}") for head in range(4)]
    page = Reader(head_map("Map", cells, 3, 4, columns=("features",), highest=9, desc="d"))
    assert len([r for r in page.all("rect") if r["class"] == "void"]) == 8
    assert [r["class"] for r in page.all("rect") if r["class"] != "void"] == ["c0", "c5", "c10", "c15"]
    assert page.all("a")[3]["href"] == "/saes/x?head=3"


@pytest.mark.parametrize("text", ["<0xF0><0x9F>", " \ud83d", "<0x98>", "\ude00x"])
def test_halves_of_a_character_are_shown_as_bytes_or_code_points_never_as_replacement_marks(text: str) -> None:
    for shown in (str(token_text(text)), str(token_chip(text))):
        read = Reader(shown).text
        assert "\ufffd" not in read
        read.encode()  # a lone surrogate cannot be sent to a browser
        assert "\u27e8" in read or "<0x" in read


def shown(*texts: str, dest: int, entries: tuple[DfaEntry, ...] = ()) -> str:
    none = (0.0,)
    example = FeatureExample(0, 0, 0, 0, dest, texts, {dest: 1.0}, entries, none, none, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0)
    return str(example_tokens(example, Paint(1.0, context=None)))


def test_tokens_that_split_a_character_are_joined_and_their_parts_shown_as_bytes() -> None:
    sun = ("<0xE6>", "<0x97>", "<0xA5>")
    joined = shown(" a", *sun, " b", dest=4)
    assert Reader(joined).text == " a日 b"
    assert next(i for i in Reader(joined).all("i"))["title"] == "3 tokens: <0xE6><0x97><0xA5>"
    assert Reader(shown(*sun, dest=1)).text == "<0xE6><0x97><0xA5>", "the destination is one of them, so each stands alone"
    assert Reader(shown("<0xF0><0x9F>", "<0x99>", "<0x82>", "!", dest=3)).text == "🙂!"
    assert Reader(shown("<0xE6>", "<0x97>", "x", dest=2)).text == "<0xE6><0x97>x", "half a character is no replacement mark"
    assert Reader(shown("<0xE2>", "<0x80>", "<0xAE>", "x", dest=3)).text == "⟨202E⟩x", "joined, it still cannot turn the text"


def test_an_example_is_painted_by_one_head_to_the_scale_of_all() -> None:
    entries = (DfaEntry(0, 0, 2.0), DfaEntry(1, 1, -1.0), DfaEntry(0, 1, 1.0))
    example = FeatureExample(
        0, 0, 0, 0, 2, ("x", "y", "z"), {2: 1.0}, entries, (0.0,) * 2, (0.0,) * 2, 4.0, 2.0, 0.0, 2.0, 1.0, 0.0
    )
    assert str(example_tokens(example, Paint(1.0))) == "<u class=p15>x</u><u class=n5>y</u><b class=a15>z</b>"
    assert str(example_tokens(example, Paint(1.0, head=0))) == "<u class=p10>x</u><u>y</u><b class=a15>z</b>"
    assert str(example_tokens(example, Paint(1.0, head=1))) == "<u class=p5>x</u><u class=n5>y</u><b class=a15>z</b>"


def test_many_texts_are_escaped_in_one_step_as_each_would_be() -> None:
    texts = ["<b>", "a & b", "", "plain", '"']
    assert escaped(texts) == [str(escape(text)) for text in texts]
    assert escaped(["a\0b", "c"]) == ["a␀b", "c"]
    assert escaped([]) == []
