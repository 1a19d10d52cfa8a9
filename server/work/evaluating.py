"""Evaluation of an SAE that is there."""

from pathlib import Path
from typing import Any

from sae_core.config import EvaluateJob
from sae_core.evaluate import evaluate
from sae_core.probes import read_texts
from sae_core.saes import load_sae
from sae_core.stability import check_same_site
from server import estimates
from server.estimates import Shape
from server.store import registry
from server.work.opening import open_lens, open_rows, open_sae
from server.work.run import Run


def evaluate_job(run: Run) -> None:
    """A measurement of an SAE that exists; it takes the place of the one before."""
    cfg = EvaluateJob.model_validate(run.job.config)
    metrics = run.step("evaluate", lambda: _measure(run, cfg))
    run.step("store", lambda: _store_metrics(run, cfg.sae, metrics))


def _measure(run: Run, cfg: EvaluateJob) -> dict[str, Any]:
    worker, how = run.worker, cfg.evaluate
    with worker.db.read() as session:
        records = {name: registry.sae(session, name) for name in (cfg.sae, *cfg.against)}
        model = registry.model_by_id(session, records[cfg.sae].model_id)
    # What can be wrong with texts is said before the model is loaded.
    texts = [
        read_texts(Path(path), field=how.probe_field, label=how.probe_label, per_label=how.probe_texts) for path in cfg.probes
    ]
    lens = open_lens(run, model.name)
    sae = open_sae(worker.settings.data, records[cfg.sae], lens)
    others = {name: load_sae(worker.settings.data / records[name].folder, lens.device) for name in cfg.against}
    for name, other in others.items():
        check_same_site(sae, other, name)
    expected = estimates.evaluate_seconds(cfg, sae.cfg.site.layer, Shape.of(lens.info), worker.speed)
    run.clock = estimates.Clock({"evaluate": expected})
    rows = open_rows(run, lens, cfg.corpus, cfg)
    found = run.follow(
        evaluate(
            lens,
            sae,
            rows,
            prose_rows=how.prose_rows,
            repeated_rows=how.repeated_rows,
            dead_tokens=how.dead_tokens,
            batch_rows=how.batch_rows,
            others=others,
            texts=texts,
        )
    )
    return found.model_dump(mode="json") | {"corpus": cfg.corpus}


def _store_metrics(run: Run, sae: str, metrics: dict[str, Any]) -> None:
    with run.write() as session:
        registry.note_metrics(session, sae, metrics)
    for note in metrics["notes"]:
        run.say(note)
