"""What an SAE's page says of an evaluation: a new one in full, an old one, and one in which anything at all is missing."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sae_core.evaluate import Evaluation
from server.app import create_app
from server.panels import MEASURES
from tests.web.conftest import SAE, at, put
from tests.web.factory import METRICS, Shape, interval

NEW = {
    "l1": 55.5, "explained_variance": 0.757, "mse": 1.234, "cosine": 0.871, "norm_in": 4.0, "norm_out": 3.5, "norm_ratio": 0.882,
    "gamma": 0.953, "gamma_centred": 0.941, "gamma_by_head": [0.9] * 9, "dense_1": 0.345, "dense_10": 0.0123,
    "by_position": [
        {"low": 1, "high": 1, "tokens": 512, "fvu": 0.111, "l0": 21.5},
        {"low": 2, "high": 3, "tokens": 1024, "fvu": 0.222, "l0": 27.5},
    ],
    "density_quantiles": [{"share": 0.5, "density": 0.00321}, {"share": 0.95, "density": 0.0321}],
    "decoder_cosine": 0.444, "encoder_cosine": 0.333, "encoder_decoder_cosine": 0.666,
}  # fmt: skip
NEW_LOSS = {
    "sae_kl": interval(0.0712, 0.004), "zero_kl": interval(1.21, 0.05), "mean_kl": interval(1.11, 0.05),
    "kl_recovered_zero": 0.941, "kl_recovered_mean": 0.936, "zero_output": 1.975, "output_gap": 2.5e-06,
    "by_position": [{"low": 0, "high": 0, "sae_minus_clean": interval(0.01, 0.01)}],
}  # fmt: skip


def accuracy(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.04, "high": mean + 0.04}


def label(name: str, best: float, features: list[int]) -> dict[str, Any]:
    sparse = [{"k": k, "accuracy": accuracy(best - 0.1 / k)} for k in (1, 2, 5)]
    return {
        "label": name, "train": 80, "test": 80, "majority": 0.5, "sparse": sparse, "z": accuracy(0.958), "features": features,
    }  # fmt: skip


PROBE = {
    "name": "languages.jsonl", "texts": 320, "labels": [label("de", 0.93, [5, 17]), label("<b>fr", 0.89, [3, 8])],
    "majority": 0.5, "sparse": [{"k": k, "accuracy": accuracy(0.9 - 0.1 / k)} for k in (1, 2, 5)], "z": accuracy(0.951),
    "note": "3 texts were left out",
}  # fmt: skip
STABILITY = {
    "against": "seed-2", "features": 4600, "others": 4580, "mean": 0.777, "median": 0.812, "above_07": 0.654, "above_09": 0.321,
    "mutual": 0.543, "mutual_mean": 0.876,
}  # fmt: skip
MEASURED: dict[str, Any] = {
    "reconstruction": METRICS["reconstruction"] | NEW,
    "prose": METRICS["prose"] | {"zero_output": METRICS["prose"]["zero"]},
    "repeated": METRICS["repeated"] | NEW_LOSS,
    "probes": [PROBE],
    "stability": [STABILITY],
    "notes": ["The loss on held-out text is not finite."],
    "corpus": "wiki",
}


def page_of(folder: Path, metrics: dict[str, Any]) -> Iterator[str]:
    settings = put(at(folder), Shape(metrics=metrics, n_features=30))
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        answer = client.get(SAE)
        assert answer.status_code == 200
        assert client.get(f"{SAE}.json").json()["overview"]["metrics"] == metrics
        yield answer.text


def text_of(folder: Path, metrics: dict[str, Any]) -> str:
    return next(page_of(folder, metrics))


def test_these_metrics_are_what_evaluation_stores() -> None:
    stored = {name: value for name, value in MEASURED.items() if name != "corpus"}
    assert Evaluation.model_validate(stored).model_dump(mode="json", exclude_unset=True) == stored
    fields = type(Evaluation.model_validate(stored).reconstruction).model_fields
    assert {key for key, *_ in MEASURES} <= set(fields), "every measure that pages name is one that is made"


def test_every_measure_has_its_number_and_its_meaning_in_words(tmp_path: Path) -> None:
    page = text_of(tmp_path, MEASURED)
    for key, name, form, words in MEASURES:
        shown = f"<dt>{name.replace('>', '&gt;')}</dt><dd>{form(NEW[key])}</dd>"  # type: ignore[arg-type]
        assert shown in page, name
        assert page.count(words.split(":")[0].replace("'", "&#39;")) >= 2, "in a tooltip, and as text for who has none"
    assert "0.321 %" in page.replace("\N{NARROW NO-BREAK SPACE}", " ")  # the median density
    assert "The loss on held-out text is not finite." in page
    assert "on text held out of wiki" in page


def test_positions_are_charts_with_their_numbers_as_text(tmp_path: Path) -> None:
    page = text_of(tmp_path, MEASURED)
    for title, numbers in (("Unexplained by position", ("0.1110", "0.2220")), ("L0 by position", ("21.50", "27.50"))):
        chart = page.split(f"<figcaption>{title}")[1].split("</figure>")[0]
        assert "<th scope=row>2–3" in chart
        assert all(f"<td>{number}" in chart for number in numbers)


def test_divergences_stand_beside_losses(tmp_path: Path) -> None:
    page = text_of(tmp_path, MEASURED)
    repeated, prose = page.split("<h3>Random tokens said twice")[1].split("<h3>Held-out text")
    assert "0.0712" in repeated
    assert "KL 94.1" in repeated
    assert "no output, no bias" in repeated, "b_O matters there"
    assert "changes no loss by more than 2.5e−6 nats: the output is z W_O + b_O." in repeated
    assert "no output, no bias" not in prose
    assert "KL" not in prose.split("</table>")[0], "an older SAE has none"


def test_probes_lead_to_features_and_matches_to_saes(tmp_path: Path) -> None:
    page = text_of(tmp_path, MEASURED)
    assert "What its features know of languages.jsonl" in page
    assert f'href="{SAE}/features/17"' in page
    assert "&lt;b&gt;fr" in page
    assert "<b>fr" not in page
    assert 'href="/saes/seed-2"' in page
    assert "0.777" in page


def test_an_sae_that_was_evaluated_before_these_measures_shows_what_it_has(tmp_path: Path) -> None:
    page = text_of(tmp_path, METRICS)
    assert "unexplained variance" in page
    assert "what these mean" not in page
    assert "by position" not in page
    assert "What its features know" not in page


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a number stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*here, key))
    if isinstance(value, float):
        yield here


@pytest.mark.parametrize("gone", ["numbers", "prose", "everything"])
def test_no_missing_number_breaks_the_page(tmp_path: Path, gone: str) -> None:
    metrics = copy.deepcopy(MEASURED)
    for path in paths(MEASURED):
        if gone == "numbers" and path[0] in ("reconstruction", "prose", "repeated", "stability"):  # a probe's are always there
            at_path: Any = metrics
            for key in path[:-1]:
                at_path = at_path[key]
            at_path[path[-1]] = None
    if gone == "prose":
        metrics["prose"] = None
    page = text_of(tmp_path, {} if gone == "everything" else metrics)
    assert ("It has not been evaluated yet." in page) == (gone == "everything")
    assert "nan" not in page.split("<main")[1].lower().replace("finance", "")
    assert "None" not in page.split("How good it is")[1].split("What its features are like")[0]
