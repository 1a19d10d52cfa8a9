"""Measuring an SAE that exists: as a job in a worker, and from the command line."""

import json
from pathlib import Path

import pytest

from sae_core.config import EvaluateConfig, EvaluateJob
from sae_core.errors import NotFound, UnknownCorpus
from server.store import registry
from tests.jobs.conftest import Home, tiny_config
from tests.jobs.test_worker import working

QUICK = tiny_config(harvests=())
SMALL = EvaluateConfig(prose_rows=8, repeated_rows=4, dead_tokens=2048)


def job(sae: str = "x", **changed: object) -> EvaluateJob:
    return EvaluateJob.model_validate({"sae": sae, "corpus": "words", "rows": QUICK.rows, "evaluate": SMALL} | changed)


def metrics_of(home: Home, name: str) -> dict[str, object]:
    with home.db.read() as session:
        return registry.metrics(session, name)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Texts whose label is a word that only they have."""
    path = tmp_path / "labelled.jsonl"
    pools = {"cats": ["the", "cat", "sat", "on", "a", "mat"], "homes": ["then", "it", "ran", "home", "fast", "and"]}
    records = [
        {"text": " ".join(pool[(i * step + i // 6) % len(pool)] for step in range(1, 8)) + f" {i}", "label": label}
        for label, pool in pools.items()
        for i in range(30)
    ]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_an_evaluation_replaces_what_was_known_and_keeps_probes_and_matches_it_did_not_make(home: Home, labelled: Path) -> None:
    trained = [home.jobs.enqueue_train(QUICK.model_copy(update={"seed": seed}), name="x") for seed in (0, 1)]
    with working(home):
        assert [home.wait(one) for one in trained] == ["done", "done"], [home.error(one) for one in trained]
        before = metrics_of(home, "x")
        first = home.jobs.enqueue_evaluate(job(against=("x-2",), probes=(str(labelled),)))
        assert first == home.jobs.enqueue_evaluate(job(against=("x-2",), probes=(str(labelled),))), "asked twice, it runs once"
        assert home.wait(first) == "done", home.error(first)
        full = metrics_of(home, "x")
        second = home.jobs.enqueue_evaluate(job())
        assert home.wait(second) == "done", home.error(second)
    plain = metrics_of(home, "x")
    assert before["probes"] == []
    assert full["corpus"] == "words"
    assert full["reconstruction"] != before["reconstruction"], "on fewer training tokens"
    assert [one["name"] for one in full["probes"]] == ["labelled.jsonl"]  # type: ignore[attr-defined]
    assert [(one["against"], 0 < one["mean"] < 1) for one in full["stability"]] == [("x-2", True)]  # type: ignore[attr-defined]
    assert plain == full, "the same numbers again, the rest kept"
    json.dumps(full, allow_nan=False)
    with working(home):
        again = home.jobs.enqueue_evaluate(job())
        assert (again != second, home.wait(again)) == (True, "done")


def test_what_cannot_be_measured_is_refused_in_words(home: Home, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="There is no SAE x"):
        home.jobs.enqueue_evaluate(job())
    trained = home.jobs.enqueue_train(QUICK, name="x")
    other = home.jobs.enqueue_train(QUICK.model_copy(update={"site": QUICK.site.model_copy(update={"layer": 2})}), name="y")
    with working(home):
        assert [home.wait(trained), home.wait(other)] == ["done", "done"], home.error(trained)
        with pytest.raises(NotFound, match="There is no SAE nobody"):
            home.jobs.enqueue_evaluate(job(against=("nobody",)))
        with pytest.raises(UnknownCorpus):
            home.jobs.enqueue_evaluate(job(corpus="none"))
        before = metrics_of(home, "x")
        elsewhere = home.jobs.enqueue_evaluate(job(against=("y",)))
        assert home.wait(elsewhere) == "failed"
        gone = home.jobs.enqueue_evaluate(job(probes=(str(tmp_path / "gone.jsonl"),)))
        assert home.wait(gone) == "failed"
    assert "y reads layer 2 of tiny, not layer 1 of tiny" in (home.error(elsewhere) or "")
    assert "There is no file or folder" in (home.error(gone) or "")
    assert metrics_of(home, "x") == before
