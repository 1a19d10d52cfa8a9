"""What jobs of every kind open: the model, an SAE, rows of a corpus, activations left on disk."""

from pathlib import Path

from sae_core.activations import Activations, about
from sae_core.config import EvaluateJob, HarvestJob, HeadsStudy, InductionStudy, SpecificityStudy, TrainConfig
from sae_core.corpus import Rows, prepare_rows
from sae_core.lens import Lens
from sae_core.saes import SAE, check_fits, load_sae
from sae_core.train import activations_of
from server.store import registry, removals
from server.work.run import Run

OfText = TrainConfig | HarvestJob | EvaluateJob | SpecificityStudy | InductionStudy | HeadsStudy


def open_lens(run: Run, model: str) -> Lens:
    """The model of that name, loaded; the store learns its sizes."""
    lens = run.worker.lens(model)
    with run.write() as session:
        registry.note_shape(session, model, lens.info)
    return lens


def open_rows(run: Run, lens: Lens, corpus: str, cfg: OfText) -> Rows:
    """The corpus cut into rows of tokens, without what was taken out of it; cut now if they are not on disk."""
    with run.worker.db.read() as session:
        source, without = registry.corpus(session, corpus).source, removals.hashes(session, corpus)
    return run.follow(
        prepare_rows(
            source,
            cfg.rows,
            encode=lens.encode,
            row_start=lens.row_start,
            tokenizer_fingerprint=lens.tokenizer_fingerprint,
            folder=run.worker.settings.data / "rows",
            without=without,
        )
    )


def open_activations(run: Run, folder: Path, lens: Lens, rows: Rows, cfg: TrainConfig) -> Activations | None:
    """What is left on disk of the activations that a training run in `folder` read."""
    store = activations_of(cfg, folder, caches(run.worker.settings.data))
    return Activations.open(store, cfg.site.layer, about(lens, rows, cfg))


def caches(data: Path) -> Path:
    """Where activation caches that have a name are."""
    return data / "activations"


def open_sae(data: Path, record: registry.SAERecord, lens: Lens) -> SAE:
    """The SAE's weights, on the model's device, when they fit the model."""
    sae = load_sae(data / record.folder, lens.device)
    check_fits(sae.cfg, lens.info, record.name)
    return sae
