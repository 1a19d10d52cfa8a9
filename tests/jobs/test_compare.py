"""Matching the features of two SAEs, as a job in a worker."""

import pytest

from sae_core.config import CompareJob
from sae_core.errors import NotFound, SAEMismatch
from server.store import studies
from server.store.compare import compare_saes
from tests.jobs.conftest import Home, tiny_config
from tests.jobs.test_worker import working

QUICK = tiny_config(harvests=())


def test_a_worker_matches_two_saes_and_the_page_has_what_it_found(home: Home) -> None:
    other_layer = QUICK.model_copy(update={"site": QUICK.site.model_copy(update={"layer": QUICK.site.layer - 1})})
    configs = [QUICK, QUICK.model_copy(update={"seed": 1}), other_layer]
    trained = [home.jobs.enqueue_train(cfg, name="x") for cfg in configs]
    with working(home):
        assert [home.wait(one) for one in trained] == ["done"] * 3, [home.error(one) for one in trained]
        job = home.jobs.enqueue_compare(CompareJob(sae="x", against="x-2"))
        assert home.wait(job) == "done", home.error(job)
    with home.db.read() as session:
        made = studies.of_job(session, job)
        assert made is not None
        record = studies.study(session, made)
        page = compare_saes(session, "x-2", "x")
    assert record.kind == "compare"
    assert record.result["mutual"] > 0
    assert "no published harvest" in record.result["notes"][0]
    assert sum(record.result["ours"]["counts"]) == page.b.sae.d_sae
    assert page.matched is not None
    assert page.matched.swapped
    with pytest.raises(SAEMismatch, match="one site"):
        home.jobs.enqueue_compare(CompareJob(sae="x", against="x-3"))
    with pytest.raises(NotFound):
        home.jobs.enqueue_compare(CompareJob(sae="x", against="nothing"))
