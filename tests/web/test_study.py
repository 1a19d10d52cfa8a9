"""`/studies` and its pages: what a study found, as people and scripts meet it; its plots."""

import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sae_core.config import (
    AnyStudy,
    HeadsStudy,
    InductionStudy,
    IoiStudy,
    ModelSource,
    PrefixStudy,
    RegexProxy,
    SpecificityStudy,
)
from sae_core.lens import load_lens
from sae_core.studies import heads as every_head
from sae_core.studies.induction import doing_induction, in_text, induction, synthetic
from sae_core.studies.ioi import ioi
from sae_core.studies.prefix import prefix
from server.app import create_app
from server.charts import HeadCell, Line, Point, back_to_back, head_map, lines
from server.db import Database
from server.settings import Settings
from server.store import studies
from server.tables import SAE, Job, Model
from tests.core import test_ioi, test_prefix
from tests.core.test_heads_study import Rules as HeadRules
from tests.core.test_heads_study import study as heads_study
from tests.core.test_induction import Rules, done, study, text_rows
from tests.core.test_rdfa import random_sae
from tests.core.test_specificity import Known, known_sae, rows_of, specificity
from tests.core.tiny_models import save_tiny
from tests.web.conftest import at, put
from tests.web.reading import PART, Reader, counted

NASTY = "<img src=x onerror=alert(1)>"


def specific(**changed: object) -> tuple[SpecificityStudy, dict[str, Any]]:
    """A study of a feature that is known, made as a worker makes it; its SAE and corpus are called otherwise here."""
    fields: dict[str, object] = {"sae": "smollm2-l17", "feature": 5, "corpus": "demo", "proxies": (RegexProxy(pattern="[bdg]"),)}
    cfg = SpecificityStudy.model_validate(fields | changed)
    found = done(specificity(Known(), known_sae(), rows_of(), cfg.model_copy(update={"feature": 0})))  # type: ignore[arg-type]
    return cfg, found.model_dump(mode="json")


def of_heads(*, text: bool = True) -> tuple[InductionStudy, dict[str, Any]]:
    """A study of heads that are rules."""
    cfg, rules = study(model="smollm2-135m", corpus="demo" if text else None), Rules()
    scores = done(synthetic(rules, cfg))  # type: ignore[arg-type]
    seen = done(in_text(rules, text_rows(), cfg, doing_induction(scores))) if text else None  # type: ignore[arg-type]
    return cfg, induction(rules, cfg, scores, seen).model_dump(mode="json")  # type: ignore[arg-type]


def of_every_head(*, text: bool = True) -> tuple[HeadsStudy, dict[str, Any]]:
    """A study of heads that are rules, with scores of weights as a model's would be."""
    cfg, rules = heads_study(model="smollm2-135m", corpus="demo" if text else None), HeadRules()
    random = done(every_head.on_random(rules, cfg))  # type: ignore[arg-type]
    seen = done(every_head.in_text(rules, text_rows(), cfg)) if text else None  # type: ignore[arg-type]
    scores = ((0.9, 3.0, 0.1), (0.1, 0.2, 0.6), (-0.8, -2.5, 0.0), (0.0, 0.1, 0.2))
    written = [
        every_head.HeadWeights(layer=0, head=i, copying=a, own=b, successor=c, by_sequence={"letter": c, "weekday": c})
        for i, (a, b, c) in enumerate(scores)
    ]
    weights = every_head.Weights(tokens=128, chance=0.1, sequences={"letter": 25, "weekday": 7}, heads=written)
    return cfg, every_head.heads(rules, cfg, random, seen, weights).model_dump(mode="json")  # type: ignore[arg-type]


@cache
def of_saes() -> tuple[tuple[IoiStudy, dict[str, Any]], tuple[PrefixStudy, dict[str, Any]]]:
    """Studies of an SAE drawn at random on a tiny model, whose names are letters."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        test_ioi.shrink(patch)
        place = save_tiny("llama", Path(folder))
        lens = load_lens(ModelSource(location=str(place)), name="tiny", cache=Path(folder))
        first, second = test_ioi.small(sae="smollm2-l17"), test_prefix.small(sae="smollm2-l17")
        objects = done(ioi(lens, random_sae(lens, 2), first))
        prefixes = done(prefix(lens, test_prefix.telling(lens, second), second))
    return (first, objects.model_dump(mode="json")), (second, prefixes.model_dump(mode="json"))


def keep(settings: Settings, cfg: AnyStudy, result: dict[str, Any], title: str = "A question") -> int:
    database = Database(settings.url)
    with database.write() as session:
        sae = session.query(SAE).one()
        model = session.query(Model).one()
        feature = cfg.feature if isinstance(cfg, SpecificityStudy) else None
        about = (sae.id, feature) if isinstance(cfg, SpecificityStudy | IoiStudy | PrefixStudy) else (None, None)
        study_id = studies.write(
            session, job_id=f"study-{cfg.hash()}", kind=cfg.kind, title=title, model_id=model.id, sae_id=about[0],
            feature=about[1], config=cfg.model_dump(mode="json"), result=result,
        )  # fmt: skip
    database.close()
    return study_id


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Settings]]:
    """Pages on a database with studies: 1 of a feature, 2 of heads, 3 of heads without text, 4 and 5 the same of every head, 6 of
    indirect objects, 7 of prefixes."""
    settings = put(at(tmp_path_factory.mktemp("studies")))
    made = (specific(), of_heads(), of_heads(text=False), of_every_head(), of_every_head(text=False), *of_saes())
    for number, (cfg, result) in enumerate(made, 1):
        assert keep(settings, cfg, result, f"Question {number}") == number
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client, settings


@pytest.fixture
def pages(kept: tuple[TestClient, Settings]) -> TestClient:
    return kept[0]


def test_the_list_leads_to_every_study_and_says_what_it_found(pages: TestClient) -> None:
    read = Reader(pages.get("/studies").text)
    assert read.refused == []
    assert {f"/studies/{i}" for i in range(1, 8)} <= {a["href"] for a in read.all("a")}
    assert "precision 3" in read.text
    assert "1 short-prefix head (0.0); 2 long-prefix heads (0.1, 1.1); of 6 heads" in read.text
    listed = pages.get("/studies.json").json()["studies"]
    assert [one["id"] for one in listed] == [7, 6, 5, 4, 3, 2, 1], "newest first"
    assert (listed[6]["sae"], listed[6]["feature"], listed[2]["sae"]) == ("smollm2-l17", 5, None)
    assert (listed[0]["sae"], listed[0]["feature"]) == ("smollm2-l17", None)
    assert "result" not in listed[0]


def test_a_features_page_asks_for_its_studies_which_the_list_gives_as_a_block(pages: TestClient) -> None:
    asked = "/studies?sae=smollm2-l17&feature=5"
    read = Reader(pages.get("/saes/smollm2-l17/features/5").text)
    assert asked in {div.get("hx-get") for div in read.all("div")}
    assert asked in {a["href"] for a in read.all("a")}, "without scripts it is a link"
    block = pages.get(asked, headers=PART).text
    assert "<html" not in block
    assert "/studies/1" in {a["href"] for a in Reader(block).all("a")}
    assert [one["id"] for one in pages.get("/studies.json?sae=smollm2-l17&feature=5").json()["studies"]] == [1]
    none = pages.get("/studies?sae=smollm2-l17&feature=6", headers=PART).text
    assert 'href="/jobs/new/specificity?sae=smollm2-l17&amp;feature=6"' in none
    assert pages.get("/studies?feature=6").status_code == 422


def test_without_studies_the_list_says_how_to_make_one(empty_client: TestClient) -> None:
    assert "headscope study induction --model gpt2" in Reader(empty_client.get("/studies").text).text


def test_a_features_study_shows_its_cells_intervals_and_examples(pages: TestClient) -> None:
    answer = pages.get("/studies/1")
    read, found = Reader(answer.text), pages.get("/studies/1.json").json()["study"]["result"]
    assert read.refused == []
    for n in (found["both"], found["feature_alone"], found["proxy_alone"], found["neither"]):
        assert f">{n}<" in answer.text
    assert "the text so far ends with /[bdg]/" in read.text
    assert [figure for figure in read.all("figure") if "two-sided" in figure["class"]] != []
    assert answer.text.count('<li class="case">') == len(found["false_negatives"]) + sum(
        len(part["false_positives"]) + len(part["true_positives"]) for part in found["ranges"]
    )
    assert answer.text.count('class="t dest"') == answer.text.count('<li class="case">')
    assert "/saes/smollm2-l17/features/5" in {a["href"] for a in read.all("a")}
    assert len(read.all("svg")) - len(read.all("path")) >= 3


def test_every_plot_has_a_title_a_description_and_its_numbers_as_text(pages: TestClient) -> None:
    for number, n in ((1, 3), (2, 4), (4, 3), (6, 2), (7, 3)):
        text = pages.get(f"/studies/{number}").text
        drawings = text.split("<figure")[1:]
        assert len(drawings) >= n
        for drawing in drawings:
            assert "<title>" in drawing
            assert "<desc>" in drawing
            assert "as text</summary>" in drawing
            assert drawing.split("</figure>")[0].count("<tr>") >= 2


def test_a_study_of_heads_draws_the_strongest_of_each_role_or_those_asked_for(pages: TestClient) -> None:
    text = pages.get("/studies/2").text
    read = Reader(text)
    assert read.refused == []
    assert "1 short-prefix and 2 long-prefix heads" in read.text
    assert "Head 0.0: prefix of what it attends to" in read.text
    assert "Head 1.1: prefix" in read.text
    assert "Head 1.2: prefix" not in read.text
    rows = read.text.split("Cutting:")[1]
    assert "long-prefix" in rows
    assert "-0.80" in rows.replace("−", "-")
    only = Reader(pages.get("/studies/2?heads=0.1").text)
    assert "Head 0.1: prefix" in only.text
    assert "Head 0.0: prefix" not in only.text
    links = {a["href"] for a in only.all("a")}
    assert "/studies/2?heads=0.1%2C0.0" in links, "a head more"
    assert "/studies/2" in links, "the last one taken away shows the strongest again"
    unknown = Reader(pages.get("/studies/2?heads=77.1").text)
    assert "Head 0.0: prefix" in unknown.text


def test_a_study_of_heads_without_text_leaves_its_plots_out(pages: TestClient) -> None:
    read = Reader(pages.get("/studies/3").text)
    assert "No text was given" in read.text
    assert "In real text: attention" not in read.text
    assert "cut to one" not in read.text


def marked(drawing: str) -> dict[str, str]:
    """What the map of heads says of each cell."""
    return {said.split(":")[0]: said for said in re.findall(r"<title>(head [^<]*)</title>", drawing)}


def test_a_study_of_every_head_maps_the_score_that_is_asked_for(pages: TestClient) -> None:
    read = Reader(first := pages.get("/studies/4").text)
    assert read.refused == []
    assert marked(first)["head 0.2"] == "head 0.2: 0.800, induction, copy suppression"
    assert "induction: at least 0.30" in read.text
    links = {a["href"] for a in read.all("a")}
    assert {f"/studies/4?score={key}" for key in ("previous", "text-start", "copying", "own", "successor")} <= links
    copying = pages.get("/studies/4?score=copying&heads=0.3").text
    cells = marked(copying)
    assert cells["head 0.0"] == "head 0.0: 0.900, previous token, copying"
    assert cells["head 0.3"].endswith("–, shown")
    map_only = copying.split("as text")[0]
    assert map_only.count('class="mark s0"') == 1, "one copies"
    assert map_only.count('class="mark s3"') == 1, "one does the opposite"
    assert "copy suppression: at most −0.50" in Reader(copying).text.replace("-0.50", "−0.50")
    order = re.findall(r'<tr><td><a href="[^"]*"[^>]*>(0\.\d)</a>', copying)
    assert order == ["0.0", "0.2", "0.1", "0.3"], "strongest first, whatever the sign"
    again = {a["href"] for a in Reader(copying).all("a")}
    assert "/studies/4?score=copying" in again, "the head chosen is let go"
    assert "/studies/4?score=own&heads=0.3" in again, "another score keeps it"
    assert "letter 0.60, weekday 0.60" in copying


def test_without_text_or_weights_a_study_of_every_head_offers_what_there_is(pages: TestClient, tmp_path: Path) -> None:
    links = {a["href"] for a in Reader(pages.get("/studies/5").text).all("a")}
    assert not any("text-" in address for address in links)
    assert "/studies/5?score=copying" in links
    asked = pages.get("/studies/5?score=text-previous")
    assert asked.status_code == 200, "an address of another study does no harm"
    assert marked(asked.text)["head 0.0"].startswith("head 0.0: –")
    settings, (cfg, result) = put(at(tmp_path)), of_every_head()
    nothing = {"copying": None, "own": None, "successor": None, "by_sequence": {}}
    heads = [head | nothing for head in result["heads"]]
    keep(settings, cfg, result | {"heads": heads, "vocabulary": 0, "chance": None, "sequences": {}, "notes": ["No weights."]})
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        text = client.get("/studies/1").text
    assert "No weights." in text
    assert "score=copying" not in text
    assert "What is written" not in text


def test_a_score_that_is_none_is_refused_with_those_there_are(pages: TestClient) -> None:
    answer = pages.get("/studies/4?score=beauty")
    assert answer.status_code == 422
    assert "'beauty' is no score; there are previous, duplicate, induction" in answer.text.replace("&#39;", "'")


def test_no_more_heads_are_drawn_than_can_be_told_apart() -> None:
    from server.pages.study import SHOWN, _strongest

    heads = [{"layer": 1, "head": i, "role": "short-prefix" if i % 4 else "long-prefix", "best": 1 - i / 50} for i in range(20)]
    shown = _strongest(heads)
    assert len(shown) == len(set(shown)) == SHOWN
    assert shown[:6] == ["1.1", "1.2", "1.3", "1.0", "1.4", "1.8"]
    few = [head | {"role": "not induction"} for head in heads]
    assert _strongest(few) == ["1.0", "1.1", "1.2"]


def test_what_is_not_there_is_said(pages: TestClient) -> None:
    for path in ("/studies/99", "/studies/99.json"):
        answer = pages.get(path)
        assert answer.status_code == 404
        assert "There is no study 99" in answer.text
    assert pages.get("/studies/2?heads=all").status_code == 422
    assert "write them as layer.head" in pages.get("/studies/2?heads=all").text


def test_a_study_never_changes_so_a_browser_that_has_it_is_told_so(pages: TestClient) -> None:
    tag = pages.get("/studies/2").headers["etag"]
    assert pages.get("/studies/2", headers={"If-None-Match": tag}).status_code == 304
    assert pages.get("/studies/2?heads=0.1", headers={"If-None-Match": tag}).status_code == 200


def test_a_page_takes_two_queries_and_a_list_one(kept: tuple[TestClient, Settings]) -> None:
    client, _ = kept
    for path, n in (("/studies", 1), ("/studies/1", 1), ("/studies/2", 1), ("/studies/4", 1)):
        with counted(client.app.state.db.engine) as statements:  # type: ignore[attr-defined]
            client.get(path)
        assert len(statements) == n, statements


def test_a_job_leads_to_its_study_and_its_feature(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = put(at(tmp_path_factory.mktemp("job")))
    cfg, result = specific()
    keep(settings, cfg, result)
    database = Database(settings.url)
    with database.write() as session:
        job = f"study-{cfg.hash()}"
        session.add(
            Job(id=job, kind="study", title="Feature 5", config=cfg.model_dump(mode="json"), status="done", total=1, done=1)
        )
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        links = {a["href"] for a in Reader(client.get(f"/jobs/{job}").text).all("a")}
        assert {"/studies/1", "/saes/smollm2-l17/features/5"} <= links
        assert client.get(f"/jobs/{job}.json").json()["study"] == 1
        assert client.get("/jobs/train-running-1.json").json()["study"] is None


def test_hostile_texts_stay_text(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = put(at(tmp_path_factory.mktemp("nasty")))
    cfg, result = specific(proxies=(RegexProxy(pattern="<script>|[bdg]"),))
    for one in result["false_negatives"]:
        one["texts"] = [NASTY] * len(one["texts"])
    keep(settings, cfg, result | {"summary": NASTY, "notes": [NASTY]}, NASTY)
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        for path in ("/studies", "/studies/1"):
            read = Reader(client.get(path).text)
            assert read.refused == []
            assert read.all("img") == []
            assert NASTY in read.text


# ---- plots ----


def test_a_line_is_drawn_to_scale_with_its_band() -> None:
    drawn = lines("T", [Line("one", 2, [Point(1, 0.0, 0.0, 0.5), Point(2, 1.0, 0.5, 1.0)])], desc="D", across="x")
    read = Reader(drawn)
    line = next(p for p in read.all("polyline") if p["class"] == "edge")["points"].split()
    (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in line)
    assert x1 < x2
    assert (y1, y2) == (220, 12), "from the floor to the top"
    band = read.all("polygon")[0]["points"].split()
    assert [float(point.split(",")[1]) for point in band] == [220, 116, 12, 116]
    assert len([p for p in read.all("path") if p["class"] == "mark"]) == 2
    assert "one, 2.00: 1.00 (0.500 to 1.00)" in read.text
    assert "Nothing to draw" in Reader(lines("T", [], desc="D", across="x")).text


def test_two_histograms_share_their_scale() -> None:
    drawn = back_to_back("T", [0, 1, 2], [4, 0], [2, 1], names=("a", "b"), across="x", desc="D")
    rects = Reader(drawn).all("rect")
    up = [float(r["height"]) for r in rects if r["class"] == "up"]
    down = [float(r["height"]) for r in rects if r["class"] == "down"]
    assert up[0] == pytest.approx(2 * down[0])
    assert down[0] == pytest.approx(2 * down[1])
    assert up[1] == 0
    logarithmic = Reader(back_to_back("T", [0, 1], [99], [9], names=("a", "b"), across="x", desc="D", log=True)).all("rect")
    heights = {r["class"]: float(r["height"]) for r in logarithmic}
    assert heights["up"] == pytest.approx(2 * heights["down"], rel=1e-2), "log 100 is twice log 10"
    assert "Nothing to draw" in Reader(back_to_back("T", [], [], [], names=("a", "b"), across="x", desc="D")).text


def test_the_map_marks_heads_by_role_and_leads_on() -> None:
    cells = [
        HeadCell(0, 1, 0.8, ("0.800", "long-prefix"), "/a?b=1&c=2", 3, True),
        HeadCell(1, 0, 0.0, ("0", "not <induction>"), "/b"),
    ]
    read = Reader(head_map("T", cells, 2, 2, columns=("score", "role"), highest=1, desc="D"))
    assert [a["href"] for a in read.all("a")][:2] == ["/a?b=1&c=2", "/b"]
    assert len(read.all("path")) == 1
    colours = [r["class"] for r in read.all("rect")]
    assert colours == ["void", "void", "c12", "c0"]
    assert "head 0.1: 0.800, long-prefix, shown" in read.text
    assert "not <induction>" in read.text


# ---- of SAEs ----


def test_a_study_of_indirect_objects_shows_each_condition_and_feature(pages: TestClient) -> None:
    answer = pages.get("/studies/6")
    read, found = Reader(answer.text), pages.get("/studies/6.json").json()["study"]["result"]
    assert read.refused == []
    for one in found["conditions"]:
        assert one["says"] in read.text
    links = {a["href"] for a in read.all("a")}
    assert {f"/saes/smollm2-l17/features/{one['index']}" for one in found["features"]} <= links
    assert f"{found['controls'][0]['as_large']['hits']} of 4" in read.text
    marks = answer.text.split("Change of the logit difference")[0].count('<path class="mark"')
    assert marks >= 2 * len(found["conditions"])
    (data,) = (link for link in links if "figure=logit-difference-left" in link and link.endswith(".csv"))
    rows = pages.get(data if data.startswith("/") else f"/studies/6{data}").text.splitlines()
    assert rows[0] == "what,of,value,low,high"
    assert len(rows) == 1 + 2 * len(found["conditions"])


def test_a_study_of_prefixes_shows_features_losses_and_ablations(pages: TestClient) -> None:
    read, found = Reader(pages.get("/studies/7").text), pages.get("/studies/7.json").json()["study"]["result"]
    assert read.refused == []
    assert f"{found['features'][0]['index']} {found['features'][0]['role']}" in read.text
    assert "with the repetition" in read.text
    assert "other features" in read.text
    assert "resampled" in read.text
