"""Imports: a peer's SAE, and dashboards that another tool made."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sae_core import attribution
from sae_core.config import DashboardsJob, HarvestConfig, ImportJob
from sae_core.errors import SAEMismatch, UnreadableDashboards
from sae_core.formats import convert, fetched, open_peer
from sae_core.progress import Progress
from sae_core.records import HarvestTotals
from sae_core.saes import load_sae, save_sae
from sae_core.train import made_by
from server import harvest_plan, jobs
from server.db import sqlite_path
from server.exchange import dashboards
from server.exchange.reading import Readers
from server.keeping import room
from server.store import harvests, imports, registry, search
from server.store.foreign import Chunk
from server.work.opening import open_lens
from server.work.publishing import publish_sae
from server.work.run import Run

NEIGHBOURS = 10  # nearest features kept of an imported harvest


def import_job(run: Run) -> None:
    """A peer's SAE, made one of ours; or dashboards of one that is here, made a harvest."""
    if "sae" in run.job.config:
        import_dashboards(run, DashboardsJob.model_validate(run.job.config))
        return
    cfg = ImportJob.model_validate(run.job.config)
    run.step("convert", lambda: _convert(run, cfg))
    run.step("publish", lambda: publish_sae(run, cfg.model, jobs.sae_name(run.id), {}))


def _convert(run: Run, cfg: ImportJob) -> None:
    run.report(Progress("convert", 0, 2, "parts"))
    # What can be wrong with the files is said before the model is loaded.
    if (place := Path(cfg.location)).exists():
        room.need_room(run.worker.settings, room.size_of(place), "This import")
    peer = open_peer(fetched(cfg.location, cfg.revision), cfg.format, cfg.scale)
    run.report(Progress("convert", 1, 2, "parts"))
    sae = convert(peer, open_lens(run, cfg.model), cfg.location, layer=cfg.layer, folded=cfg.folded)
    save_sae(sae, made_by(run.folder, 0))
    run.say(f"{peer.path} is {peer.format}'s: {sae.cfg.d_sae:,} features on layer {sae.cfg.site.layer}, {sae.cfg.arch}.")
    for note in sae.cfg.imported.notes if sae.cfg.imported else ():
        run.say(note)
    run.report(Progress("convert", 2, 2, "parts"))


def import_dashboards(run: Run, cfg: DashboardsJob) -> None:
    """File by file, each a durable step; published when every feature is there."""
    layout = dashboards.look(Path(cfg.location))
    worker = run.worker
    with worker.db.read() as session:
        record = registry.sae(session, cfg.sae)
    if sqlite_path(worker.settings.url):
        room.need_room(worker.settings, record.config.d_sae * harvest_plan.FEATURE_IN_DATABASE, "This import")
    if record.config.d_sae <= max(layout.skipped, default=-1):
        raise SAEMismatch(
            f"{layout.folder} is of an SAE with more than the {record.config.d_sae:,} features of {cfg.sae}.", field="sae"
        )
    sae = load_sae(worker.settings.data / record.folder)
    shares = attribution.head_norm_shares(sae.W_dec, sae.cfg.n_heads)
    near = attribution.decoder_neighbours(sae.W_dec, NEIGHBOURS)
    pairs = [
        [[idx, round(cosine, 4)] for idx, cosine in zip(*one, strict=True)]
        for one in zip(near.indices.tolist(), near.cosines.tolist(), strict=True)
    ]
    about = dashboards.About(shares.numpy(), pairs)
    harvest_id: int = run.step("begin", lambda: _begin_dashboards(run, cfg, record, layout))
    texts = imports.Texts.of(worker.db, harvest_id)
    covered: set[int] = set()
    with Readers(layout, about, imports.unwritten(worker.db, harvest_id, layout.parts)) as readers:
        for done, number in enumerate(layout.parts):
            run.report(Progress("read", done, len(layout.parts), "files"))
            covered.update(run.step(f"read {number}", partial(_read_dashboards, run, record, readers, number, harvest_id, texts)))
    run.step("check", lambda: _check_covered(run, cfg, covered, layout, record))
    dead = (dashboards.feature_record(index, about) for index in sorted(layout.skipped - covered))
    run.step("dead", lambda: imports.write_dead(worker.db, harvest_id, dead, run.fence))
    run.step("count", lambda: imports.count_up(worker.db, harvest_id, run.fence))
    run.step("search", lambda: search.write(worker.db, harvest_id, run.fence))
    run.step("publish", lambda: harvests.publish(worker.db, harvest_id, 0, run.fence))
    run.say(f"Published: {worker.settings.address}/saes/{record.name}.")


def _begin_dashboards(run: Run, cfg: DashboardsJob, record: registry.SAERecord, layout: dashboards.Layout) -> int:
    with run.write() as session:
        corpus = registry.foreign_corpus(session, cfg.corpus, layout.dataset)
    kept = HarvestConfig(tokens=layout.n_tokens or 1, bands=5, per_band=5, window=max(layout.context, 8))
    totals = HarvestTotals(layout.n_tokens, 0, 0, layout.context)
    harvest_id = harvests.begin(
        run.worker.db, sae_id=record.id, corpus_id=corpus.id, job_id=run.id, config=kept.model_dump(mode="json"), totals=totals,
        fence=run.fence,
    )  # fmt: skip
    imports.note_source(run.worker.db, harvest_id, layout.source, run.fence)
    run.say(f"{layout.folder} holds {len(layout.parts)} files of {layout.format}.")
    return harvest_id


def _read_dashboards(
    run: Run, record: registry.SAERecord, readers: Readers, number: int, harvest_id: int, texts: imports.Texts
) -> list[int]:
    """The features of one file, stored."""
    covered: list[int] = []

    def seen() -> Iterator[Chunk]:
        for chunk in readers.chunks(number):
            covered.extend(feature.idx for feature in chunk.records)
            yield chunk

    imports.write_file(run.worker.db, harvest_id, record.id, number, seen(), texts, run.fence)
    if not covered:  # written before, by an attempt that was killed before it could say so
        covered = [feature.idx for chunk in readers.chunks(number) for feature in chunk.records]
    return covered


def _check_covered(
    run: Run, cfg: DashboardsJob, covered: set[int], layout: dashboards.Layout, record: registry.SAERecord
) -> None:
    if lacking := dashboards.missing_features(covered, layout, record.config.d_sae):
        if not cfg.partial:
            raise UnreadableDashboards(lacking)
        run.say(lacking)
