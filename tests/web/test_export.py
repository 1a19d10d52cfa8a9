"""Selections as files: the same features in each form, sent in parts that are small whatever the whole is."""

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from server.api import export, parts
from server.api.export import NoParquet, Selection, Source
from server.api.parts import PARTS, ExampleParts, FeatureParts
from server.app import create_app
from server.db import Database
from server.settings import Settings
from server.store.features import feature_pages
from server.store.saes import find_sae
from server.store.stored_harvests import delete
from tests.web.conftest import SAE
from tests.web.test_api import API, got

EXPORT = f"{API}{SAE}/features/export"
EVERY = ",".join(PARTS)


@pytest.fixture
def lines(client: TestClient) -> list[dict[str, Any]]:
    """Everything, as JSON lines."""
    answer = client.get(EXPORT, params={"sort": "idx", "include": EVERY, "all_examples": True})
    assert answer.headers["content-type"] == "application/jsonl"
    assert answer.headers["x-headscope-features"] == "60"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_json_lines_hold_what_a_feature_answers(client: TestClient, lines: list[dict[str, Any]]) -> None:
    assert [line["index"] for line in lines] == list(range(60))
    for index in (0, 3, 7):
        assert lines[index] == got(client, f"{API}{SAE}/features/{index}", include=EVERY, all_examples=True)


@pytest.fixture
def table(client: TestClient) -> Any:
    """Everything, as a Parquet file."""
    answer = client.get(EXPORT, params={"sort": "idx", "include": EVERY, "all_examples": True, "format": "parquet"})
    assert answer.headers["content-type"] == "application/vnd.apache.parquet"
    return pyarrow.parquet.read_table(io.BytesIO(answer.content))


def plain(value: Any) -> Any:
    """What Arrow gives back, in the form of JSON: mappings are pairs there, and free ones text."""
    if isinstance(value, dict):
        return {name: json.loads(one) if name in ("evidence", "sample") else plain(one) for name, one in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return {str(key): one for key, one in value}
    return [plain(one) for one in value] if isinstance(value, list) else value


def test_parquet_holds_the_same_in_nested_columns(lines: list[dict[str, Any]], table: Any) -> None:
    assert table.num_rows == 60
    rows = [plain(row) for row in table.to_pylist()]
    for row, line in zip(rows, lines, strict=True):
        for one in row["examples"]:
            one["acts"] = dict(one["acts"]) if one["acts"] else {}
        assert row == line


def test_arrow_does_not_ask_pandas_what_things_are() -> None:
    # It would load it, which holds 35 MB for as long as the process lives. A process of its own: the test's has pandas.
    code = """
import sys
import pyarrow
from server.api import export
made = [export._array(pyarrow, *of) for of in (
    ([1, None], int | None), ([0.5, float("nan")], float), ([True, None, False], bool | None),
    (["a", None, "\u00e9"], str | None), ([{"a": 1}, None], dict[str, export.Any] | None),
    ([{1: 0.5}, {}, None], dict[int, float] | None), ([(1, 2), None, ()], tuple[int, ...] | None),
)]
for one in made:
    one.validate(full=True)
print(repr([one.to_pylist() for one in made]), "pandas" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == (
        "[[1, None], [0.5, nan], [True, None, False], ['a', None, '\u00e9'], ['{\"a\":1}', None], [[(1, 0.5)], [], None], "
        "[[1, 2], None, []]] False"
    )


def test_csv_has_the_same_columns_with_lists_as_json(client: TestClient, lines: list[dict[str, Any]]) -> None:
    answer = client.get(EXPORT, params={"sort": "idx", "include": "heads,examples", "format": "csv"})
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    assert len(rows) == 60
    assert "logits" not in rows[0]
    for row, line in zip(rows, lines, strict=True):
        assert float(row["max_act"]) == line["max_act"]
        assert row["family"] == (line["family"] or "")
        assert json.loads(row["heads"]) == line["heads"]
        assert all(one["dfa"] is None for one in json.loads(row["examples"]))


def test_what_a_csv_file_holds_is_read_back_and_runs_nothing() -> None:
    nested = {"text": 'said "so",\nthen', "of": [1, None, 0.5]}
    given = ['say "so"', "two\r\nlines", "a,b", "", None, "=1+1", "+1", " @sum", "\tx", "a\0b", "東京", nested, (1, 2)]
    numbers = [3, -2, 0.1, 1e-9, math.inf, np.float64(1 / 3)]
    (read,) = csv.reader(io.StringIO(export._line([*given, *numbers]).decode(), newline=""), strict=True)
    assert read[:11] == [
        'say "so"', "two\r\nlines", "a,b", "", "", "'=1+1", "'+1", "' @sum", "'\tx", "a\u2400b", "東京",
    ]  # fmt: skip
    assert [json.loads(text) for text in read[11:13]] == [nested, [1, 2]]
    assert [float(text) for text in read[13:]] == numbers
    assert read[13:15] == ["3", "-2"]


def test_the_api_writes_the_json_that_pydantic_makes(source: Source) -> None:
    with source.db.read() as session:
        pages = feature_pages(session, source.door, range(60), every=True)
    made = [parts.of_page(page, frozenset(PARTS)) for page in pages]
    assert made[3].families is not None
    odd = replace(made[3].families, sample={"of": [math.nan, -math.inf, None, "\u2028é\0"]})
    broken = replace(made[3], mean_act=math.nan, family_score=math.inf, families=odd)
    theirs = TypeAdapter(FeatureParts)
    assert sum(len(example.dfa.entries) for one in made for example in one.examples or () if example.dfa) > 1000
    for one in (*made, parts.of_page(pages[3], frozenset()), broken):
        assert json.loads(parts.to_json(one)) == json.loads(theirs.dump_json(with_plain_entries(one)))


def with_plain_entries(one: FeatureParts) -> FeatureParts:
    """The same with DFA entries as pydantic knows them: as the mappings that the document describes."""
    return replace(one, examples=one.examples and tuple(map(with_mappings, one.examples)))


def with_mappings(example: ExampleParts) -> ExampleParts:
    assert example.dfa is not None
    entries: Any = tuple({"src": entry.src, "head": entry.head, "value": entry.value} for entry in example.dfa.entries)
    return replace(example, dfa=replace(example.dfa, entries=entries))


def test_a_table_without_parts_has_numbers_alone(client: TestClient) -> None:
    answer = client.get(EXPORT, params={"format": "csv", "family": "induction", "sort": "-density"})
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    assert not {*PARTS, "kept"} & set(rows[0])
    densities = [float(row["density"]) for row in rows]
    assert densities == sorted(densities, reverse=True)
    assert {row["family"] for row in rows} == {"induction"}


def test_an_empty_selection_is_an_empty_file_of_its_form(client: TestClient) -> None:
    for form in ("jsonl", "csv", "parquet"):
        answer = client.get(EXPORT, params={"format": form, "min_density": 1})
        assert answer.status_code == 200
        assert answer.headers["x-headscope-features"] == "0"
        if form == "parquet":
            assert pyarrow.parquet.read_table(io.BytesIO(answer.content)).num_rows == 0
        else:
            assert answer.text.count("\n") == (form == "csv")


@pytest.fixture
def source(peopled: Settings) -> Iterator[Source]:
    """A selection of a database of the test's own."""
    database = Database(peopled.url)
    with database.read() as session:
        door = find_sae(session, "smollm2-l17")
    yield Source(database, door, Selection(sort="-max"), 60)
    database.close()


def test_features_are_read_some_at_a_time_and_each_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "WALKED", 7)
    read = list(source.read(3))
    assert max(map(len, read)) == 3
    found = [one.index for part in read for one in part]
    assert len(found) == 60
    with source.db.read() as session:
        acts = {page.index: page.max_act for page in feature_pages(session, source.door, found)}
    assert [acts[index] for index in found] == sorted(acts.values(), reverse=True)


@pytest.mark.parametrize("walked", [100, 3], ids=["in one walk", "between two walks"])
def test_an_export_whose_harvest_is_deleted_breaks_off(source: Source, monkeypatch: pytest.MonkeyPatch, walked: int) -> None:
    monkeypatch.setattr(export, "WALKED", walked)
    read = source.read(3)
    next(read)
    assert source.door.sae.harvest is not None
    delete(source.db, source.door.sae.harvest.id, force=True)
    with pytest.raises(RuntimeError, match="it changed meanwhile"):
        list(read)


def test_without_pyarrow_parquet_is_refused_and_the_rest_works(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise NoParquet("Parquet needs pyarrow, which is not installed here.", field="format")

    monkeypatch.setattr(export, "_pyarrow", absent)
    answer = client.get(EXPORT, params={"format": "parquet"})
    assert answer.status_code == 503
    assert answer.json()["error"] == {"code": "no_parquet", "message": str(answer.json()["error"]["message"]), "field": "format"}
    assert client.get(EXPORT, params={"format": "csv"}).status_code == 200


def test_an_sae_without_a_harvest_has_nothing_to_export(peopled: Settings) -> None:
    database = Database(peopled.url)
    delete(database, 1, force=True)
    database.close()
    with TestClient(create_app(peopled), base_url="http://127.0.0.1:8000") as client:
        assert client.get(EXPORT).status_code == 404
        assert client.get(f"{API}{SAE}/features/3").status_code == 404
        assert got(client, f"{API}{SAE}/features")["rows"] == []


def test_the_packages_that_parquet_needs_are_imported_when_it_is_asked_for() -> None:
    source = Path(export.__file__).read_text()
    assert "\nimport pyarrow" not in source
