"""The published `neuronpedia` package, told another base address, works against a server that listens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.web.conftest import at, listened, put
from tests.web.peer import client_finds

MODEL, SOURCE, INDEX = "smollm2-135m", "17-smollm2-l17", 3


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from listened(put(at(tmp_path_factory.mktemp("served"))))


def script(base: str, do: str, folder: Path, index: int = INDEX) -> Any:
    """What the client found."""
    return client_finds(base, do, folder, (MODEL, SOURCE, index))


def test_it_reads_a_feature_and_works_with_a_list(served: str, tmp_path: Path) -> None:
    found = script(served, "stored", tmp_path)
    feature, whole = found["feature"], found["whole"]
    assert (feature["modelId"], feature["source"], int(feature["index"])) == (MODEL, SOURCE, INDEX)
    assert feature["density"] == whole["frac_nonzero"] > 0
    assert len(feature["activations"]) == len(whole["activations"]) == 12
    for mine, theirs in zip(feature["activations"], whole["activations"], strict=True):
        assert mine["values"][theirs["maxValueTokenIndex"]] == theirs["maxValue"]
    assert whole["sourceSet"]["showDfa"] is whole["sourceSet"]["showHeadAttribution"] is True
    assert found["set"]["sources"] == [found["source"]] == [{"id": SOURCE, "model_id": MODEL, "set_name": "smollm2-l17"}]
    assert [item["index"] for item in found["made"]["items"]] == [item["index"] for item in found["read"]["items"]] == ["3", "5"]
    assert found["made"]["id"] in [one["id"] for one in found["owned"]]
    assert found["read"]["description"] == "why"


def test_explanations_that_it_uploads_become_labels(served: str, tmp_path: Path) -> None:
    found = script(served, "upload", tmp_path, index=8)
    assert found["sent"] == {"message": "1 explanations created."}
    assert "density" in found["refused"]
    (explanation,) = found["feature"]["explanations"]
    assert explanation["text"] == "words that follow a number"
    assert explanation["explainer_model"] == "gpt-4o-mini"


def test_what_is_not_there_is_a_404_to_it(served: str, tmp_path: Path) -> None:
    assert script(served, "missing", tmp_path) == ["HTTPError: Resource not found: 404"] * 3
