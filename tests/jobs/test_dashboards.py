"""Dashboards of others become a harvest: SAEDashboard's own files, and Neuronpedia's bulk layout."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from sae_core.config import DashboardsJob
from sae_core.errors import UnreadableDashboards
from sae_core.formats import convert, open_peer
from sae_core.saes import save_sae
from server.api.parts import PARTS
from server.api.v1 import DOCUMENT
from server.app import create_app
from server.cli import app
from server.exchange import dashboards
from server.exchange.reading import Readers
from server.store import registry
from server.store.features import FeaturePage, feature_page
from server.store.labels import feature_labels
from server.store.saes import find_sae
from tests.core.test_formats import CASES, lens
from tests.jobs.conftest import Home, wait_for
from tests.jobs.test_worker import working

THEIRS = CASES.parent / "dashboards"
D_SAE = 40


@pytest.fixture
def sae(home: Home) -> str:
    """The SAE whose features the dashboards show, imported."""
    made = convert(open_peer(CASES / "saelens-jumprelu"), lens(), "x")
    sha256 = save_sae(made, home.settings.data / "saes" / "mine")
    with home.db.write() as session:
        model = registry.model(session, "tiny").id
        registry.upsert_sae(
            session, job_id="import-mine-1", name="mine", model_id=model, config=made.cfg, metrics={}, folder="saes/mine",
            sha256=sha256,
        )  # fmt: skip
    return "mine"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(THEIRS, tmp_path / "theirs"))


def neuronpedia(source: Path, folder: Path) -> Path:
    """The same features in Neuronpedia's bulk layout, with explanations."""

    def write(kind: str, number: int, lines: list[dict[str, Any]]) -> None:
        path = folder / kind / f"batch-{number}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))

    for number in (0, 1):
        batch = json.loads((source / f"batch-{number}.json").read_text())
        features, activations, explanations = [], [], []
        for feature in batch["features"]:
            key = {"modelId": "tiny", "layer": "1-att-tiny", "index": str(feature["feature_index"])}
            rest = {name: value for name, value in feature.items() if name not in ("activations", "feature_index", "vector")}
            features.append(key | rest | {"maxActApprox": max(max(a["values"]) for a in feature["activations"])})
            for one in feature["activations"]:
                names = {"binMin": "bin_min", "binMax": "bin_max", "binContains": "bin_contains"}
                names |= {"dfaValues": "dfa_values", "dfaTargetIndex": "dfa_targetIndex"}
                activations.append(key | {to: one[of] for to, of in names.items()} | {n: one[n] for n in ("tokens", "values")})
            said = {"description": f"fires on words {feature['feature_index']}", "typeName": "oai_attention-head"}
            explanations.append(key | said | {"explanationModelName": "gpt-5"})
        write("features", number, features)
        write("activations", number, activations)
        write("explanations", number, explanations)
    return folder


def imported(home: Home, folder: Path, sae: str, **changes: Any) -> str:
    job = home.jobs.enqueue_dashboards(DashboardsJob(location=str(folder), sae=sae, **changes))
    if home.jobs.get(job).ended:
        home.jobs.retry(job, even_done=True)
    home.wait(job)
    return job


def page(home: Home, sae: str, index: int) -> FeaturePage:
    with home.db.read() as session:
        return feature_page(session, find_sae(session, sae), index, every=True)


@pytest.fixture
def web(home: Home) -> Iterator[TestClient]:
    with TestClient(create_app(home.settings), base_url="http://127.0.0.1:8000") as client:
        yield client


def assert_examples_are_what_the_sae_does(home: Home, sae: str) -> None:
    """Against the activations that the maker kept: every example's text, where it fires, how strongly."""
    expected = np.load(THEIRS / "expected.npz")
    words = np.array(["<s>", *(f" w{i}" for i in range(1, 30))])
    prompts = {tuple(words[row[1:]]): number for number, row in enumerate(expected["tokens"])}
    n, with_dfa = 0, 0
    for index in range(D_SAE):
        for example in page(home, sae, index).examples:
            acts = expected["acts"][prompts[example.texts], 1:, index]
            assert set(example.acts) == set(np.flatnonzero(acts > 5e-4).tolist())
            for position, act in example.acts.items():
                assert act == pytest.approx(acts[position], rel=0.01, abs=1e-3)
            assert example.act == pytest.approx(acts[example.dest], abs=1e-3)
            n += 1
            with_dfa += example.attributed == "heads summed"
            if example.attributed == "none":
                assert example.dfa == ()
    assert n > 200
    assert with_dfa > 50


def test_what_saedashboard_wrote_can_be_browsed(home: Home, sae: str, theirs: Path, web: TestClient) -> None:
    with working(home):
        job = imported(home, theirs, sae)
        assert home.status(job) == "done", home.error(job)
        again = home.jobs.enqueue_dashboards(DashboardsJob(location=str(theirs), sae=sae))
        assert again == job
    assert_examples_are_what_the_sae_does(home, sae)
    feature = page(home, sae, 0)
    raw = json.loads((theirs / "batch-0.json").read_text())["features"][0]
    assert [t.text for t in feature.promoted] == raw["pos_str"]
    assert sum(feature.histogram_counts) == feature.n_fired == sum(raw["freq_hist_data_bar_heights"])
    assert feature.density == pytest.approx(raw["frac_nonzero"])
    assert [head.norm_share for head in feature.heads] == pytest.approx(raw["decoder_weights_dist"], abs=1e-5)
    assert feature.families == ()
    assert feature.agreement is None
    assert feature.sae.harvest is not None
    assert feature.sae.harvest.n_live == D_SAE
    assert feature.sae.harvest.source is not None
    assert feature.sae.harvest.source["dfa"] == "heads summed"

    for path in (
        "/",
        "/saes/mine",
        "/saes/mine/features/0",
        "/saes/mine/heads/1",
        "/saes/mine/features/0/labels",
        "/embed/saes/mine/features/0",
    ):
        assert web.get(path).status_code == 200, path
    assert "Families are not known of imported features" in web.get("/saes/mine").text
    text = web.get("/saes/mine/features/0").text
    assert "Imported from SAEDashboard files, which have no DFA by head" in text
    assert "DFA of all heads together" in text
    assert "nan" not in text
    assert "by data, mean DFA" in text
    twin = web.get("/saes/mine/features/0.json").json()
    assert twin["heads"][0]["dfa"] is None
    assert web.get("/saes/mine/features/0/preview.png").status_code == 200
    found = web.get("/saes/mine/search", params={"q": "w7", "kind": "text"})
    assert found.status_code == 200
    assert "feature" in found.text
    refused = web.get("/saes/mine/features/0/components", params={"band": 0, "rank": 0})
    assert refused.status_code in (200, 422)
    assert "imported as text" in refused.text


def test_neuronpedias_bulk_files_can_be_browsed_with_their_explanations(
    home: Home, sae: str, theirs: Path, tmp_path: Path
) -> None:
    bulk = neuronpedia(theirs, tmp_path / "v1" / "tiny" / "1-att-tiny")
    with working(home):
        job = imported(home, bulk, sae)
        assert home.status(job) == "done", home.error(job)
        assert_examples_are_what_the_sae_does(home, sae)
        twice = imported(home, bulk, sae, corpus="their words")
        assert home.status(twice) == "done", home.error(twice)
    with home.db.read() as session:
        door = find_sae(session, sae)
        (label,) = feature_labels(session, door.sae, door.id, 7).labels
    assert door.sae.harvest is not None
    assert door.sae.harvest.corpus == "their words"
    assert (label.text, label.author, label.method) == ("fires on words 7", "gpt-5", "oai_attention-head")


def test_missing_batches_are_named_and_taken_when_they_are_there(home: Home, sae: str, theirs: Path, tmp_path: Path) -> None:
    (theirs / "batch-1.json").rename(tmp_path / "kept.json")
    with working(home):
        job = imported(home, theirs, sae)
        assert home.status(job) == "failed"
        assert "20 of 40 features are in no file" in str(home.error(job))
        with home.db.read() as session:
            assert find_sae(session, sae).sae.harvest is None
        partial = imported(home, theirs, sae, partial=True)
        assert home.status(partial) == "done", home.error(partial)
        with home.db.read() as session:
            harvest = find_sae(session, sae).sae.harvest
        assert harvest is not None
        assert harvest.n_live == 20
        (tmp_path / "kept.json").rename(theirs / "batch-1.json")
        assert imported(home, theirs, sae) == job
        assert home.status(job) == "done", home.error(job)
    assert_examples_are_what_the_sae_does(home, sae)


@pytest.mark.parametrize("form", ["saedashboard", "neuronpedia"])
def test_what_was_imported_goes_out_and_comes_back_equal(
    home: Home, sae: str, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("HEADSCOPE_DATA", str(home.settings.data))
    out = tmp_path / "out"
    with working(home):
        job = imported(home, theirs, sae)
        assert home.status(job) == "done", home.error(job)
        before = [page(home, sae, index) for index in range(D_SAE)]
        done = CliRunner().invoke(app, ["export", "dashboards", sae, str(out), "--form", form], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "40 features" in done.output
        again = imported(home, out if form == "saedashboard" else next((out / "v1").glob("*/*-att-*")), sae)
        assert home.status(again) == "done", home.error(again)
    for index, feature in enumerate(before):
        back = page(home, sae, index)
        assert [e.texts for e in back.examples] == [e.texts for e in feature.examples]
        assert [(e.band, e.rank, e.dest, e.attributed) for e in back.examples] == [
            (e.band, e.rank, e.dest, e.attributed) for e in feature.examples
        ]
        for one, other in zip(back.examples, feature.examples, strict=True):
            assert one.acts == pytest.approx(other.acts, rel=1e-4)
            given, back_again = (
                {d.src: d.value for d in of.dfa if d.value} for of in (other, one)
            )  # what is rounded to 0 is none
            assert back_again == pytest.approx(given, rel=1e-4)
        assert back.histogram_counts == feature.histogram_counts
        assert back.histogram_edges == pytest.approx(feature.histogram_edges, rel=1e-3)
        assert [t.text for t in back.promoted] == [t.text for t in feature.promoted]
        assert back.density == pytest.approx(feature.density)


def test_what_is_wrong_with_a_folder_is_said_before_anything_is_queued(theirs: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(UnreadableDashboards) as found:
            dashboards.look(folder)
        return str(found.value)

    assert "no folder" in refused(tmp_path / "none")
    assert "neither SAEDashboard's" in refused(tmp_path)
    bulk = neuronpedia(theirs, tmp_path / "v1" / "tiny" / "1-att-tiny")
    assert "1-att-tiny" in refused(tmp_path / "v1")
    (bulk / "activations" / "batch-1.jsonl.gz").unlink()
    assert "activations/batch-1.jsonl.gz" in refused(bulk)
    (theirs / "batch-0.json").unlink()
    assert "lacks batch-0.json" in refused(theirs)


def broken_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(field: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        batch = json.loads(path.read_text())
        del batch["features"][3][field]
        path.write_text(json.dumps(batch))

    return change


@pytest.mark.parametrize("change", [broken_off, without("activations"), without("frac_nonzero")])
def test_a_damaged_batch_is_named(theirs: Path, change: Callable[[Path], None]) -> None:
    change(theirs / "batch-1.json")
    layout = dashboards.look(theirs)
    about = dashboards.About(np.full((D_SAE, 4), 0.25, np.float32), [[]] * D_SAE)
    assert len(list(dashboards.read(layout, 0, about))) == 20
    with pytest.raises(UnreadableDashboards, match=r"batch-1\.json"):
        list(dashboards.read(layout, 1, about))
    with pytest.raises(UnreadableDashboards, match="the SAE has 10"):
        list(dashboards.read(layout, 0, dashboards.About(about.head_norm[:10], about.neighbours)))


@pytest.mark.parametrize("dfa", [True, False])
def test_scripts_read_what_was_imported_and_what_lacks_is_null(
    home: Home, sae: str, theirs: Path, web: TestClient, dfa: bool
) -> None:
    if not dfa:
        for path in theirs.glob("batch-*.json"):
            batch = json.loads(path.read_text())
            for feature in batch["features"]:
                for one in feature["activations"]:
                    one.update(dfa_values=[], dfa_maxValue=0, dfa_targetIndex=-1)
            path.write_text(json.dumps(batch))
    with working(home):
        job = imported(home, theirs, sae)
        assert home.status(job) == "done", home.error(job)

    of = f"/api/v1/saes/{sae}"
    for path, route in (
        (of, "/saes/{sae}"),
        (f"{of}/features", "/saes/{sae}/features"),
        (f"{of}/features?head=1&sort=-dfa_share", "/saes/{sae}/features"),
        (f"{of}/features/0?include={','.join(PARTS)}&all_examples=true", "/saes/{sae}/features/{index}"),
        (f"{of}/heads", "/saes/{sae}/heads"),
        (f"{of}/heads/1", "/saes/{sae}/heads/{head}"),
        (f"{of}/families", "/saes/{sae}/families"),
        (f"{of}/search?q=w7", "/saes/{sae}/search"),
        ("/api/v1/saes", "/saes"),
        ("/api/v1/harvests", "/harvests"),
        ("/api/v1/models/tiny/heads", "/models/{model}/heads"),
    ):
        answer = web.get(path)
        assert answer.status_code == 200, (path, answer.text)
        said = DOCUMENT.openapi["paths"][f"/api/v1{route}"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema_rs.validator_for(said | {"components": DOCUMENT.openapi["components"]}).validate(answer.json())

    feature = web.get(f"{of}/features/0?include=heads,dfa&all_examples=true").json()
    assert all(one["dfa"] is one["dfa_std"] is one["dfa_share"] is None for one in feature["heads"]["shares"])
    assert feature["heads"]["agreement"] is None
    assert {one["attributed"] for one in feature["examples"]} == ({"heads summed", "none"} if dfa else {"none"})
    lines = [json.loads(line) for line in web.get(f"{of}/features/export?include=heads,dfa&all_examples=true").text.splitlines()]
    assert len(lines) == D_SAE
    assert next(line for line in lines if line["index"] == 0) == feature

    row = web.get("/api/feature/tiny/1-mine/0").json()
    assert len(row["activations"]) == len(feature["examples"])
    raw = json.loads((theirs / "batch-0.json").read_text())["features"][0]
    assert row["decoder_weights_dist"] == pytest.approx(raw["decoder_weights_dist"], abs=1e-5)
    assert row["pos_str"] == raw["pos_str"]
    with_dfa = [one for one in row["activations"] if one["dfaTargetIndex"] is not None]
    assert bool(with_dfa) == dfa
    for one in with_dfa:
        assert one["dfaTargetIndex"] == one["qualifyingTokenIndex"]
        assert len(one["dfaValues"]) == len(one["tokens"])
    for one in row["activations"]:
        if one not in with_dfa:
            assert (one["dfaValues"], one["dfaMaxValue"], one["headscope"]["dfaByHead"]) == ([], None, [])
    body = {"modelId": "tiny", "source": "1-mine", "index": "0"}
    assert web.post("/api/activation/get", json=body).json() == row["activations"]
    assert len(web.post("/api/features-offset", json={"modelId": "tiny", "layer": "1-mine"}).json()) == 25


ABOUT = dashboards.About(np.full((D_SAE, 4), 0.25, np.float32), [[]] * D_SAE)


def test_files_read_in_processes_of_their_own_are_those_that_are_read_here(theirs: Path) -> None:
    layout = dashboards.look(theirs)
    made = []
    for processes in (0, 2):
        with Readers(layout, ABOUT, layout.parts, processes) as readers:
            made.append([chunk for number in layout.parts for chunk in readers.chunks(number)])
    here, elsewhere = made
    assert [chunk.examples for chunk in elsewhere] == [chunk.examples for chunk in here]
    assert sum(len(chunk.examples) for chunk in here) > 200
    assert [[record.idx for record in chunk.records] for chunk in elsewhere] == [[r.idx for r in chunk.records] for chunk in here]
    assert {key for chunk in elsewhere for key in chunk.texts} == {key for chunk in here for key in chunk.texts}


def test_what_is_wrong_with_a_file_is_said_by_the_process_that_reads_it(theirs: Path) -> None:
    broken_off(theirs / "batch-1.json")
    layout = dashboards.look(theirs)
    with Readers(layout, ABOUT, layout.parts, 1) as readers:
        assert len(list(readers.chunks(0))) == 1
        with pytest.raises(UnreadableDashboards, match=r"batch-1\.json"):
            list(readers.chunks(1))


HOLDS = """
import sys, time
from pathlib import Path
import numpy as np
from server.exchange import dashboards
from server.exchange.reading import Readers
if __name__ == "__main__":
    layout = dashboards.look(Path(sys.argv[1]))
    with Readers(layout, dashboards.About(np.full((40, 4), 0.25, np.float32), [[]] * 40), layout.parts, 1) as readers:
        list(readers.chunks(0))
        print(*readers.pids, flush=True)
        time.sleep(600)
"""


def test_processes_that_read_leave_when_their_worker_is_killed(theirs: Path, tmp_path: Path) -> None:
    script = tmp_path / "holds.py"
    script.write_text(HOLDS)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, script, theirs], env=env, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        assert len(pids) == 1
        os.kill(pids[0], 0)
        worker.send_signal(signal.SIGKILL)

    def gone() -> bool:
        try:
            return "State:\tZ" in Path(f"/proc/{pids[0]}/status").read_text()
        except FileNotFoundError:
            return True

    wait_for(gone, 30)


def test_numbers_that_are_none_are_passed_over_where_they_are_not_needed_and_refused_where_they_are(theirs: Path) -> None:
    path = theirs / "batch-0.json"
    batch = json.loads(path.read_text())
    batch["features"][2]["neuron_alignment_values"] = [float("nan")]
    path.write_text(json.dumps(batch))
    layout = dashboards.look(theirs)
    assert len(list(dashboards.read(layout, 0, ABOUT))) == 20
    batch["features"][2]["activations"][0]["values"][1] = float("nan")
    path.write_text(json.dumps(batch))
    with pytest.raises(UnreadableDashboards, match=r"batch-0\.json, feature 2, values of example 0 .*\[1\]"):
        list(dashboards.read(layout, 0, ABOUT))


def read_all(folder: Path) -> list[tuple[int, list[Any]]]:
    """Every feature of a folder's first file, its examples' arrays as lists."""
    features = dashboards.read(dashboards.look(folder), 0, ABOUT)
    return [(one.record.idx, [np.asarray(part).tolist() for part in vars(one.examples).values()]) for one in features]


def test_numbers_are_read_the_same_with_and_without_simdjson(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = theirs / "batch-0.json"
    batch = json.loads(path.read_text())
    first, second, third = batch["features"][0]["activations"][:3]
    first["values"] = [1e-3, 2, *first["values"][2:]]  # whole numbers and exponents
    second["dfa_values"] = None
    third["dfa_values"] = third["dfa_values"][:-1]  # of another length than the prompt
    path.write_text(json.dumps(batch, indent=1))  # spread over lines
    assert dashboards._PARSER is not None
    by_simdjson = read_all(theirs)
    monkeypatch.setattr(dashboards, "_PARSER", None)
    assert read_all(theirs) == by_simdjson
    assert sum(len(examples[0]) for _, examples in by_simdjson) > 100


@pytest.mark.parametrize("wrong", [[[0.5], 1.0], ["a"], [True], [None], {"a": 1}, 3.0, "text"])
def test_what_is_no_list_of_numbers_is_refused(theirs: Path, wrong: object) -> None:
    path = theirs / "batch-0.json"
    batch = json.loads(path.read_text())
    batch["features"][1]["activations"][0]["values"] = wrong
    path.write_text(json.dumps(batch))
    with pytest.raises(UnreadableDashboards, match=r"feature 1, values of example 0 lacks or misstates something: Expected"):
        list(dashboards.read(dashboards.look(theirs), 0, ABOUT))


def test_a_neuronpedia_feature_whose_examples_are_scattered_over_the_file_is_put_together(theirs: Path, tmp_path: Path) -> None:
    bulk = neuronpedia(theirs, tmp_path / "bulk")
    layout = dashboards.look(bulk)
    before = {feature.record.idx: feature for feature in dashboards.read(layout, 0, ABOUT)}
    path = bulk / "activations" / "batch-0.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    path.write_bytes(gzip.compress(b"\n".join(lines[::2] + lines[1::2])))
    for feature in dashboards.read(layout, 0, ABOUT):
        same = before[feature.record.idx]
        assert feature.record.bands == same.record.bands
        for name in ("band", "rank", "act"):
            assert getattr(feature.examples, name).tolist() == getattr(same.examples, name).tolist()
        assert feature.examples.fired.sum() == same.examples.fired.sum()
