"""Comparison of two SAEs: which of their features are alike."""

from typing import Any

import torch

from sae_core.config import CompareJob
from sae_core.matching import match
from sae_core.progress import Progress
from sae_core.saes import load_sae
from server import jobs
from server.store import registry, studies
from server.work.run import Run


def compare(run: Run) -> None:
    """The features of two SAEs, matched; what is found is kept as a study is."""
    cfg = CompareJob.model_validate(run.job.config)
    result = run.step("match", lambda: _match(run, cfg))
    run.step("store", lambda: _store_match(run, cfg, result))


def _match(run: Run, cfg: CompareJob) -> dict[str, Any]:
    names = (cfg.sae, cfg.against)
    run.report(Progress("match", 0, 1, "pairs"))
    with run.worker.db.read() as session:
        records = [registry.sae(session, name) for name in names]
        fired = [registry.live_features(session, name) for name in names]
    jobs.check_same_coordinates(*records)
    saes = [load_sae(run.worker.settings.data / record.folder, run.worker.device) for record in records]
    notes = [
        f"{name} has no published harvest, so all its features count, dead ones too."
        for name, live in zip(names, fired, strict=True)
        if live is None
    ]
    live = [torch.arange(sae.cfg.d_sae) if found is None else torch.tensor(found) for sae, found in zip(saes, fired, strict=True)]
    found = match(saes[0].W_dec.detach(), saes[1].W_dec.detach(), live[0], live[1], names, notes).model_dump(mode="json")
    run.report(Progress("match", 1, 1, "pairs"))
    return found


def _store_match(run: Run, cfg: CompareJob, result: dict[str, Any]) -> None:
    with run.write() as session:
        of = registry.sae(session, cfg.sae)
        studies.write(
            session,
            job_id=run.id,
            kind="compare",
            title=run.job.title,
            model_id=of.model_id,
            sae_id=of.id,
            feature=None,
            config=run.job.config,
            result=result,
        )
    run.say(f"It found: {result['summary']}.")
    where = f"compare?a={cfg.sae}&b={cfg.against}"
    run.say(f"See it at http://{run.worker.settings.host}:{run.worker.settings.port}/{where}.")
