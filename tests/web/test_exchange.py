"""What is written for others: read again it is what is stored, and a list's pages open from disk."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from sae_core.errors import UsageError
from server.db import Database
from server.exchange import bundle, dashboards, written
from server.settings import Settings
from server.store import exports, labels, lists
from server.store.exports import ExportedFeature
from server.store.features import FeaturePage, feature_page
from server.store.foreign import ForeignFeature
from server.store.lists import list_page
from server.store.saes import Door, find_sae

NAME = "smollm2-l17"


@pytest.fixture
def db(peopled: Settings) -> Iterator[Database]:
    made = Database(peopled.url)
    yield made
    made.close()


@pytest.fixture
def door(db: Database) -> Door:
    with db.read() as session:
        return find_sae(session, NAME)


def stored(db: Database, door: Door) -> dict[int, ExportedFeature]:
    return {feature.index: feature for feature in exports.features(db, door)}


def about(features: dict[int, ExportedFeature]) -> dashboards.About:
    norms = np.array([features[index].head_norm for index in sorted(features)], np.float32)
    return dashboards.About(norms, [[]] * len(norms))


class Found(NamedTuple):
    """One of the examples that were read."""

    band: int
    rank: int
    texts: list[str]
    dest: int
    acts: dict[int, float]
    dfa: dict[int, float]


def taken_apart(feature: ForeignFeature, texts: dict[bytes, list[str]]) -> Iterator[Found]:
    of, fired, sources = feature.examples, 0, 0
    for n, key in enumerate(of.keys):
        a, b = slice(fired, fired + of.fired[n]), slice(sources, sources + of.sources[n])
        fired, sources = a.stop, b.stop
        assert of.attributed[n]
        acts, dfa = (
            dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in ((of.pos[a], of.value[a]), (of.src[b], of.dfa[b]))
        )
        yield Found(int(of.band[n]), int(of.rank[n]), texts[key], int(of.dest[n]), acts, dfa)


def assert_the_same(found: Found, feature: FeaturePage) -> None:
    mine = next(e for e in feature.examples if (e.band, e.rank) == (found.band, found.rank))
    assert found.texts == list(mine.texts)
    assert found.dest + mine.start == mine.dest
    shown = {at - mine.start: act for at, act in mine.acts.items() if 0 <= at - mine.start < len(mine.texts)}
    assert found.acts == pytest.approx(shown, rel=1e-5)
    by_source: dict[int, float] = defaultdict(float)
    for src, _, value in mine.dfa:
        by_source[src - mine.start] += value
    least = 1e-6 * max(map(abs, by_source.values()))  # seven digits of the largest are written
    for src in range(len(mine.texts)):
        assert found.dfa.get(src, 0.0) == pytest.approx(by_source.get(src, 0.0), rel=1e-5, abs=least)


@pytest.mark.parametrize("form", ["saedashboard", "neuronpedia"])
def test_dashboards_that_are_written_and_read_again_are_what_is_stored(
    form: str, db: Database, door: Door, tmp_path: Path
) -> None:
    with db.write() as session:
        labels.add_label(session, door.id, 3, "names of ports", "Maren")
    features = stored(db, door)
    write = {"saedashboard": written.saedashboard, "neuronpedia": written.neuronpedia}[form]
    wrote = write(exports.features(db, door), door.sae, tmp_path / "out")
    folder = tmp_path / "out" if form == "saedashboard" else next((tmp_path / "out" / "v1").glob("*/*-att-*"))
    layout = dashboards.look(folder)
    assert layout.has_dfa
    prompts = dashboards.Prompts()
    found = {f.record.idx: f for n in layout.parts for f in dashboards.read(layout, n, about(features), prompts)}
    texts = {key: words for feature in found.values() for key, words in feature.texts.items()}
    live = {index for index, feature in features.items() if feature.n_fired}
    assert set(found) | layout.skipped == set(features)
    assert live <= set(found)
    n = 0
    for index in live:
        feature, record = features[index], found[index].record
        assert len(found[index].examples.keys) == len(feature.examples)
        with db.read() as session:
            shown = feature_page(session, door, index, every=True)
        for example in taken_apart(found[index], texts):
            assert_the_same(example, shown)
            n += 1
        assert record.density == pytest.approx(feature.density)
        assert record.max_act == pytest.approx(feature.max_act, rel=1e-6)
        assert [text for _, text, _ in record.promoted] == [text for _, text, _ in feature.promoted]
        assert tuple(record.histogram["counts"]) == feature.histogram[1]
        assert record.histogram["edges"] == pytest.approx([feature.histogram[0][0], feature.histogram[0][-1]], rel=1e-4)
    assert n == wrote.examples > 50
    if form == "neuronpedia":
        assert [label.text for label in found[3].labels] == ["names of ports"]
        flags = json.loads((folder / "sourceset.jsonl").read_text())
        assert flags["showDfa"] is True
        assert flags["showHeadAttribution"] is True
        assert (tmp_path / "out" / "v1" / "config" / "explanation_type.jsonl").exists()


def test_a_latent_cache_holds_the_activations_of_the_kept_examples(db: Database, door: Door, tmp_path: Path) -> None:
    features = stored(db, door)
    rows = exports.token_rows(db, door)
    written.delphi(exports.features(db, door), door.sae, tmp_path, rows, "smollm2")
    place = tmp_path / door.sae.hook
    (file,) = place.glob("*.safetensors")
    first, last = map(int, file.stem.split("_"))
    assert (first, last) == (0, max(features))
    cache = load_file(file)
    assert np.array_equal(cache["tokens"], rows[1])
    locations = cache["locations"].astype(np.int64) + np.array([0, 0, first])
    held = {tuple(at): act for at, act in zip(locations.tolist(), cache["activations"].astype(float).tolist(), strict=True)}
    assert len(held) == len(locations)
    for feature in features.values():
        for example in feature.examples:
            for position, act in zip(example.pos.tolist(), example.act.tolist(), strict=True):
                assert held[rows[0][example.row], position, feature.index] == pytest.approx(act, rel=2e-3)
    config = json.loads((place / "config.json").read_text())
    assert config["model_name"] == "smollm2"


def test_a_list_is_written_as_pages_that_need_nothing_else(db: Database, door: Door, tmp_path: Path) -> None:
    with db.write() as session:
        list_id = lists.create(session, "Ports <b>", "for the appendix", "Maren")
        for index in (3, 5):
            lists.add(session, list_id, door.id, index, "look here", "Maren")
    with db.read() as session:
        assert bundle.write(session, list_page(session, list_id), tmp_path) == 2
    pages = sorted(tmp_path.glob("*.html"))
    assert [page.name for page in pages] == ["index.html", f"{NAME}-3.html", f"{NAME}-5.html"]
    for page in pages:
        text = page.read_text()
        for address in re.findall(r'(?:href|src)="([^"]*)"', text):
            assert (tmp_path / address).exists(), address
        assert "<script" not in text
        assert "<b>" not in text.split("</title>")[0]
    text = (tmp_path / f"{NAME}-3.html").read_text()
    assert 'class="examples"' in text
    assert re.search(r'class="(?:t )?[^"]*\ba1?\d\b', text), "painted"


def test_a_harvest_without_token_ids_makes_no_cache(db: Database, door: Door) -> None:
    from sqlalchemy import text

    with db.write() as session:
        session.execute(text("update context set tokens = x''"))
    with pytest.raises(UsageError, match="imported as text"):
        exports.token_rows(db, door)
