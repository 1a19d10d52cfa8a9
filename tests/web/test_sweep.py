"""`/sweeps/{job_id}`: the table, the charts, what is said where nothing is known."""

import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from sae_core.config import RowsConfig, Site, SweepConfig, TrainConfig
from server.app import create_app
from server.charts import Series, Spot, frontier, marks_key, scatter
from server.db import Database
from server.pages import sweep as pages
from server.pages.reply import to_json
from server.settings import Settings
from server.store.sweeps import SweepQuery, chosen, sweep
from server.tables import SAE, Job, JobPoint, Model
from tests.web.conftest import at
from tests.web.factory import interval
from tests.web.reading import PART, Reader, counted

JOB = "sweep-s-1"
PAGE = f"/sweeps/{JOB}"
CONFIG = SweepConfig(
    base=TrainConfig(model="m", corpus="c", site=Site(layer=0), rows=RowsConfig(tokens=60_000), harvests=()),
    layers=(3, 9),
    archs=("relu", "topk"),
    ks=(8, 32),
)
RUNS = CONFIG.runs(12)
# FVU of run i; the second topk of layer 3 is as good as it gets, the runs of layer 9 are half as good.
FVU = (0.5, 0.3, 0.4, 0.2, 0.75, 0.65, 0.7, 0.6)


def metrics(index: int, l0: float) -> dict[str, Any]:
    """What an evaluation says, its parts in agreement: an SAE keeps what its FVU leaves."""
    lost = 0.02 * FVU[index]
    ce = {
        "sae_minus_clean": interval(lost, 0.002), "zero_minus_clean": interval(0.02, 0.003),
        "mean_minus_clean": interval(0.001, 0.004), "recovered_zero": 1 - FVU[index], "recovered_mean": None,
        "note": "mean-ablation changes the cross-entropy by only +0.0010 ± 0.0040 nats here, too little to divide by",
        "sae_kl": interval(lost, 0.001), "zero_kl": interval(0.04, 0.001), "kl_recovered_zero": 1 - FVU[index] / 2,
    }  # fmt: skip
    fit = {"l0": l0, "fvu": FVU[index], "dead": 0.01 * index, "gamma": 0.9 + 0.01 * index}
    return {"reconstruction": fit, "prose": ce, "repeated": ce | {"recovered_zero": 0.5}}


def add_sweep(session: Session, *, made: int, status: str = "running", job: str = JOB) -> None:
    """A sweep of eight runs of which the first are evaluated, and one more is trained."""
    at = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
    session.add(
        Job(
            id=job, kind="sweep", title="Sweep s: 8 SAEs on m, layers 3, 9", config=CONFIG.model_dump(mode="json"), status=status,
            attempt=1, phase="train", done=30_000, total=120_000, rate=5000.0, seconds_left=18.0, created_at=at, started_at=at,
        )
    )  # fmt: skip
    session.flush()
    model = session.query(Model).first()
    assert model
    for index in range(min(made + 1, len(RUNS))):
        for step in (1, 5, 9):
            values = {"l0": 100.0 / step, "fvu": 1.0 / step, "dead": 0.0, "rate": 1000.0 * (index + 1)}
            session.add(JobPoint(job_id=job, run=index, step=step, values=values))
    for index, run in enumerate(RUNS[:made]):
        name = f"s-{CONFIG.label(run)}"
        session.add(
            SAE(
                name=name, model_id=model.id, layer=run.site.layer, hook=run.site.hook, arch=run.arch, d_in=64, d_sae=512,
                k=run.k, n_heads=4, config={}, metrics=metrics(index, float(run.k) + index / 10), folder=f"saes/{name}",
                sha256="0" * 64, job_id=job, run=index,
            )
        )  # fmt: skip


def make(settings: Settings, **how: Any) -> Database:
    database = Database(settings.url)
    database.upgrade()
    with database.write() as session:
        session.add(Model(name="m", source={"location": "m"}, n_layers=12, n_heads=4, d_head=16, d_model=64, d_vocab=100))
        session.flush()
        add_sweep(session, **how)
    return database


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The web process where a sweep is done."""
    settings = at(tmp_path_factory.mktemp("swept"))
    make(settings, made=8, status="done").close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


@pytest.fixture
def running(settings: Settings) -> Iterator[TestClient]:
    """The web process while the fourth of eight runs trains."""
    make(settings, made=3).close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


def text_of(client: TestClient, address: str) -> str:
    return " ".join(Reader(client.get(address).text).text.replace("\u202f", " ").split())


def names(client: TestClient, address: str = PAGE) -> list[str]:
    """The SAEs of the table, in its order."""
    return re.findall(r'<td><a href="/saes/s-([^"]+)">', client.get(address).text)


def cells(client: TestClient, label: str, address: str = PAGE) -> list[str]:
    """The cells of a run's row as texts."""
    rows = client.get(address).text.split('class="features sweep"')[1].split("<tr")
    (row,) = [row for row in rows if f">{label}<" in row or f"<td>{label} <" in row]
    return [" ".join(Reader(f"<td{cell}").text.split()) for cell in row.replace("\u202f", " ").split("<td")[1:]]


# ---- the table ----


def test_every_run_stands_in_the_table_with_what_it_was_measured_to_be(done: TestClient) -> None:
    assert names(done) == [CONFIG.label(run) for run in RUNS]
    said = cells(done, "l03-topk-k32")
    assert said[:8] == ["l03-topk-k32", "3", "topk", "32", "×8", "0", "32.3", "20.0 %"]
    assert said[8] == "80.0 % 69.6 % to 90.4 %"
    assert said[9].startswith("withheldmean-ablation changes the cross-entropy by only +0.0010 ± 0.0040 nats")
    assert said[10:] == ["3.0 %", "0.930", "4 000"]


def test_the_interval_of_a_share_grows_with_both_of_its_losses(done: TestClient) -> None:
    run = done.get(f"{PAGE}.json").json()["rows"][0]
    kept = run["kept"]["prose ce zero"]
    assert kept["value"] == 0.5
    half = math.hypot(0.002 / 0.02, 0.5 * 0.003 / 0.02)
    assert (kept["low"], kept["high"]) == pytest.approx((0.5 - half, 0.5 + half))


@pytest.mark.parametrize(
    ("sort", "first"),
    [
        ("fvu", "l03-topk-k32"),
        ("-fvu", "l09-relu-k8"),
        ("-k", "l03-relu-k32"),
        ("arch", "l03-relu-k8"),
        ("-zero", "l03-topk-k32"),
    ],
)
def test_the_table_sorts_by_any_column(done: TestClient, sort: str, first: str) -> None:
    assert names(done, f"{PAGE}?sort={sort}")[0] == first


def test_what_has_no_value_comes_last_whichever_way_one_sorts(running: TestClient) -> None:
    for sort in ("gamma", "-gamma", "-zero"):
        rows = running.get(f"{PAGE}.json?sort={sort}").json()["rows"]
        assert [row["state"] for row in rows] == ["evaluated"] * 3 + ["training"] + ["waiting"] * 4, sort


def test_a_layer_is_chosen_by_a_plain_link(done: TestClient) -> None:
    links = [a["href"] for a in Reader(done.get(PAGE).text).all("a")]
    assert f"{PAGE}?layer=9" in links
    assert names(done, f"{PAGE}?layer=9") == [CONFIG.label(run) for run in RUNS[4:]]
    assert "No run reads this layer" in text_of(done, f"{PAGE}?layer=4")


def test_the_loss_is_chosen_by_a_plain_link(done: TestClient) -> None:
    shares = [
        done.get(f"{PAGE}.json").json()["rows"][0]["kept"][key]["value"]
        for key in ("prose ce zero", "prose kl zero", "repeated ce zero")
    ]
    assert shares == [0.5, 0.75, 0.5]
    page = text_of(done, f"{PAGE}?measure=kl&text=repeated")
    assert "on random tokens said twice, counted as KL divergence" in page
    assert "75.0 %" in page


def test_wrong_parameters_are_refused_with_their_name(done: TestClient) -> None:
    assert "columns are run, layer" in done.get(f"{PAGE}?sort=nix").text
    assert done.get(f"{PAGE}?text=nix").status_code == 422


def test_a_job_that_is_no_sweep_has_no_such_page(running: TestClient, settings: Settings) -> None:
    database = Database(settings.url)
    with database.write() as session:
        session.add(Job(id="train-x-1", kind="train", title="Train x", config={}))
    database.close()
    assert running.get("/sweeps/train-x-1").status_code == 404
    assert "/jobs/train-x-1" in running.get("/sweeps/train-x-1").text
    assert running.get("/sweeps/nothing").status_code == 404


# ---- while it runs ----


def test_a_running_sweep_shows_its_newest_batch_and_asks_again(running: TestClient, done: TestClient) -> None:
    text = text_of(running, PAGE)
    assert "3 of 8" in text
    training = cells(running, "l03-topk-k32")
    assert training[:8] == ["l03-topk-k32 training", "3", "topk", "32", "×8", "0", "11.1", "11.1 %"]
    assert cells(running, "l09-relu-k8")[0] == "l09-relu-k8 waiting"
    part = running.get(PAGE, headers=PART).text
    assert 'hx-trigger="every 2s"' in part
    assert "<html" not in part
    assert "hx-trigger" not in done.get(PAGE).text


def test_once_evaluation_has_begun_every_run_is_trained(settings: Settings) -> None:
    database = make(settings, made=3)
    with database.write() as session:
        session.query(Job).one().phase = "evaluate"
    with database.read() as session:
        assert [run.state for run in sweep(session, JOB).runs] == ["evaluated"] * 3 + ["trained"] * 5
    database.close()


def test_batches_are_no_measure_so_only_evaluated_runs_are_drawn(running: TestClient) -> None:
    drawn = re.findall(r'<path class="mark"', running.get(PAGE).text)
    assert len(drawn) == 3 + 3 + 2  # two charts of three runs, and the key of two architectures


def test_before_the_model_is_known_all_layers_are_not_counted(settings: Settings) -> None:
    database = make(settings, made=0)
    with database.write() as session:
        model, job = session.query(Model).one(), session.query(Job).one()
        model.n_layers, job.config = None, job.config | {"layers": "all"}
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        assert "known once the model is loaded" in text_of(client, PAGE)
    database.close()


# ---- where else it is seen ----


def test_the_first_page_lists_sweeps_instead_of_their_saes(done: TestClient) -> None:
    page = Reader(done.get("/").text)
    assert PAGE in [a["href"] for a in page.all("a")]
    assert "8 SAEs compared" in page.text
    assert not [a for a in page.all("a") if a["href"].startswith("/saes/")]


def test_the_job_and_the_list_of_jobs_lead_to_the_table(running: TestClient) -> None:
    for address in (f"/jobs/{JOB}", "/jobs", "/"):
        assert PAGE in [a["href"] for a in Reader(running.get(address).text).all("a")], address


def test_an_sae_of_a_sweep_shows_the_curves_of_its_own_run(done: TestClient, tmp_path: Any) -> None:
    settings = at(tmp_path)
    database = make(settings, made=8, status="done")
    with database.write() as session:
        for point in session.query(JobPoint).filter(JobPoint.run == 2):
            point.values = point.values | {"fvu": 0.123 * point.step}
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        curve = client.get("/saes/s-l03-topk-k8.json").json()["overview"]["curve"]
    assert [point["values"]["fvu"] for point in curve] == pytest.approx([0.123, 0.615, 1.107])
    assert done.get("/saes/s-l03-topk-k8.json").json()["overview"]["curve"][0]["values"]["fvu"] == 1.0


# ---- what holds for every page ----


def test_the_json_is_the_same_dataclass(done: TestClient) -> None:
    database: Database = done.app.state.db  # type: ignore[attr-defined]
    with database.read() as session:
        record, query = sweep(session, JOB), SweepQuery(layer=9)
        page = pages.SweepPage(record, query, chosen(record, query))
    assert done.get(f"{PAGE}.json?layer=9").content == to_json(page)


def test_the_page_keeps_the_content_security_policy(running: TestClient, done: TestClient) -> None:
    for client in (running, done):
        assert Reader(client.get(PAGE).text).refused == []


def test_the_page_needs_four_queries(done: TestClient) -> None:
    done.get(PAGE)
    with counted(done.app.state.db.engine) as statements:  # type: ignore[attr-defined]
        done.get(PAGE)
    assert len(statements) == 4


# ---- the drawing ----


def spots(*points: tuple[float, float]) -> list[Spot]:
    return [Spot(x, y, f"at {x}", f"/saes/{x}") for x, y in points]


def test_the_frontier_keeps_what_no_sparser_sae_beats() -> None:
    given = spots((4, 0.5), (8, 0.6), (8, 0.4), (16, 0.45), (32, 0.1))
    assert [(s.x, s.y) for s in frontier(given, "low")] == [(4, 0.5), (8, 0.4), (32, 0.1)]
    assert [(s.x, s.y) for s in frontier(given, "high")] == [(4, 0.5), (8, 0.6)]


def test_layers_are_not_compared_with_each_other(done: TestClient) -> None:
    def edges(address: str) -> int:
        return len(re.findall(r'class="edge"', done.get(address).text))

    assert edges(PAGE) == 2 * edges(f"{PAGE}?layer=3")
    mixed = [Spot(8, 0.2, "good"), Spot(16, 0.5, "of a harder layer", group=9)]
    assert len(re.findall("<polyline", scatter("t", [Series("a", 0, mixed)], desc="d", better="low"))) == 2


def places(html: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'class="mark" d="[^"]+" transform="translate\((\S+) (\S+)\)"', html)]


def test_a_doubling_of_l0_is_the_same_distance_everywhere_and_more_is_higher() -> None:
    drawn = places(scatter("t", [Series("a", 0, spots((8, 0.2), (16, 0.3), (32, 0.4)))], desc="d", better="low"))
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 > y1 > y2
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)


def test_every_mark_and_bound_lies_inside_the_drawing() -> None:
    wide = [Spot(3, 0.01, "a", None, -0.4, 0.3), Spot(3000, 0.99, "b", None, 0.9, 1.6)]
    html = str(scatter("t", [Series("a", 0, wide)], desc="d", better="low"))
    for x, y in places(html):
        assert 42 <= x <= 468
        assert 12 <= y <= 250
    ends = re.findall(r'class="bounds" x1="\S+" x2="\S+" y1="(\S+)" y2="(\S+)"', html)
    assert len(ends) == 2
    assert all(12 <= float(end) <= 250 for pair in ends for end in pair)


@pytest.mark.parametrize("points", [[(16, 0.3)], [(16, 0.3), (16, 0.3)], [(16, 0.0)], [(15, 0.3), (17, 0.3000001)]])
def test_points_that_coincide_are_drawn(points: list[tuple[float, float]]) -> None:
    html = str(scatter("t", [Series("a", 0, spots(*points))], desc="d", better="low"))
    assert len(places(html)) == len(points)
    assert "nan" not in html


def test_without_points_it_says_so() -> None:
    assert "Nothing to draw yet" in scatter("t", [], desc="d", better="low")
    assert "Nothing to draw yet" in scatter("t", [Series("a", 0, spots((0, 0.5), (4, math.nan)))], desc="d", better="low")


def test_series_differ_in_shape_as_well_as_colour_and_the_numbers_stand_beside() -> None:
    series = [Series("<b>", 0, spots((8, 0.2))), Series("topk", 1, spots((16, 0.1)))]
    html = str(scatter("t", series, desc="d", better="low"))
    shapes = re.findall(r'class="mark" d="([^"]+)"', html)
    assert len(set(shapes)) == 2
    assert 'class="s0"' in html
    assert 'class="s1"' in html
    key = str(marks_key(series))
    assert "&lt;b&gt;" in key
    assert "<b>" not in key
    assert Reader(html).refused == []
    assert "at 8" in Reader(html).text
    assert "20.0\u202f%" in Reader(html).text
