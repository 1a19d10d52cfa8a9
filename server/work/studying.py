"""Studies of features and of a model's heads."""

from typing import Any

from sae_core.config import (
    AnyStudy,
    HeadsStudy,
    InductionStudy,
    IoiStudy,
    PrefixStudy,
    SaeStudy,
    SpecificityStudy,
    study_job,
)
from sae_core.lens import Lens
from sae_core.saes import SAE
from sae_core.studies import heads as head_study
from sae_core.studies import induction
from sae_core.studies.ioi import ioi
from sae_core.studies.prefix import prefix
from sae_core.studies.specificity import specificity
from server import estimates, jobs
from server.store import registry, studies
from server.work.opening import open_lens, open_rows, open_sae
from server.work.run import Run


def study(run: Run) -> None:
    """A question put to a feature, or to the heads of a model; what is found is kept."""
    cfg = study_job(run.job.config)
    if isinstance(cfg, SpecificityStudy):
        result = run.step("scan", lambda: _specificity(run, cfg))
    elif isinstance(cfg, IoiStudy):
        result = run.step("prompts", lambda: _ioi(run, cfg))
    elif isinstance(cfg, PrefixStudy):
        result = run.step("rows", lambda: _prefix(run, cfg))
    elif isinstance(cfg, HeadsStudy):
        random = run.step("random", lambda: _heads_on_random(run, cfg))
        read = run.step("text", lambda: _heads_in_text(run, cfg)) if cfg.corpus else None
        weights = run.step("weights", lambda: _heads_weights(run, cfg))
        result = run.step("sum up", lambda: _heads(run, cfg, random, read, weights))
    else:
        scores = run.step("synthetic", lambda: _synthetic(run, cfg))
        text = run.step("text", lambda: _in_text(run, cfg, scores)) if cfg.corpus else None
        result = run.step("sum up", lambda: _sum_up(run, cfg, scores, text))
    run.step("store", lambda: _store_study(run, cfg, result))


def _specificity(run: Run, cfg: SpecificityStudy) -> dict[str, Any]:
    worker = run.worker
    with worker.db.read() as session:
        record = registry.sae(session, cfg.sae)
        model = registry.model_by_id(session, record.model_id)
    jobs.check_feature(record, cfg.feature)
    lens = open_lens(run, model.name)
    sae = open_sae(worker.settings.data, record, lens)
    rows = open_rows(run, lens, cfg.corpus, cfg)
    run.clock = estimates.Clock(
        {"scan": estimates.scan_seconds(cfg.tokens_swept, record.config.site.layer, lens.info, worker.speed)}
    )
    return run.follow(specificity(lens, sae, rows, cfg)).model_dump(mode="json")


def _ioi(run: Run, cfg: IoiStudy) -> dict[str, Any]:
    lens, sae = _lens_and_sae(run, cfg.sae)
    run.clock = estimates.Clock(estimates.ioi_seconds(cfg, sae.cfg.site.layer, lens.info, run.worker.speed))
    return run.follow(ioi(lens, sae, cfg)).model_dump(mode="json")


def _prefix(run: Run, cfg: PrefixStudy) -> dict[str, Any]:
    lens, sae = _lens_and_sae(run, cfg.sae)
    run.clock = estimates.Clock(estimates.prefix_seconds(cfg, sae.cfg.site.layer, lens.info, run.worker.speed))
    return run.follow(prefix(lens, sae, cfg)).model_dump(mode="json")


def _lens_and_sae(run: Run, name: str) -> tuple[Lens, SAE]:
    with run.worker.db.read() as session:
        record = registry.sae(session, name)
        model = registry.model_by_id(session, record.model_id)
    lens = open_lens(run, model.name)
    return lens, open_sae(run.worker.settings.data, record, lens)


def _synthetic(run: Run, cfg: InductionStudy) -> dict[str, Any]:
    lens = open_lens(run, cfg.model)
    run.clock = estimates.Clock(estimates.induction_seconds(cfg, lens.info, run.worker.speed))
    return run.follow(induction.synthetic(lens, cfg)).model_dump(mode="json")


def _in_text(run: Run, cfg: InductionStudy, scores: dict[str, Any]) -> dict[str, Any]:
    assert cfg.corpus is not None
    lens = open_lens(run, cfg.model)
    if not run.clock.expected:
        run.clock = estimates.Clock(estimates.induction_seconds(cfg, lens.info, run.worker.speed))
    rows = open_rows(run, lens, cfg.corpus, cfg)
    found = induction.doing_induction(induction.Synthetic.model_validate(scores))
    return run.follow(induction.in_text(lens, rows, cfg, found)).model_dump(mode="json")


def _sum_up(run: Run, cfg: InductionStudy, scores: dict[str, Any], text: dict[str, Any] | None) -> dict[str, Any]:
    seen = None if text is None else induction.InText.model_validate(text)
    found = induction.induction(open_lens(run, cfg.model), cfg, induction.Synthetic.model_validate(scores), seen)
    return found.model_dump(mode="json")


def _lens_of(run: Run, cfg: HeadsStudy) -> Lens:
    """The study's model; a worker that goes on with another's study learns how long what is left takes."""
    lens = open_lens(run, cfg.model)
    if not run.clock.expected:
        run.clock = estimates.Clock(estimates.heads_seconds(cfg, lens.info, run.worker.speed))
    return lens


def _heads_on_random(run: Run, cfg: HeadsStudy) -> dict[str, Any]:
    return run.follow(head_study.on_random(_lens_of(run, cfg), cfg)).model_dump(mode="json")


def _heads_in_text(run: Run, cfg: HeadsStudy) -> dict[str, Any]:
    assert cfg.corpus is not None
    lens = _lens_of(run, cfg)
    return run.follow(head_study.in_text(lens, open_rows(run, lens, cfg.corpus, cfg), cfg)).model_dump(mode="json")


def _heads_weights(run: Run, cfg: HeadsStudy) -> dict[str, Any]:
    return run.follow(head_study.on_weights(_lens_of(run, cfg), cfg)).model_dump(mode="json")


def _heads(
    run: Run, cfg: HeadsStudy, random: dict[str, Any], text: dict[str, Any] | None, weights: dict[str, Any]
) -> dict[str, Any]:
    seen = None if text is None else head_study.Seen.model_validate(text)
    parts = (head_study.Seen.model_validate(random), seen, head_study.Weights.model_validate(weights))
    return head_study.heads(open_lens(run, cfg.model), cfg, *parts).model_dump(mode="json")


def _store_study(run: Run, cfg: AnyStudy, result: dict[str, Any]) -> None:
    with run.write() as session:
        of_sae = registry.sae(session, cfg.sae) if isinstance(cfg, SpecificityStudy | SaeStudy) else None
        study_id = studies.write(
            session,
            job_id=run.id,
            kind=cfg.kind,
            title=run.job.title,
            model_id=of_sae.model_id if of_sae else registry.model(session, run.job.config["model"]).id,
            sae_id=of_sae.id if of_sae else None,
            feature=cfg.feature if isinstance(cfg, SpecificityStudy) else None,
            config=run.job.config,
            result=result,
        )
    for note in result["notes"]:
        run.say(note)
    run.say(f"It found: {result['summary']}.")
    run.say(f"See it at http://{run.worker.settings.host}:{run.worker.settings.port}/studies/{study_id}.")
