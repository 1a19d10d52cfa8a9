"""What each step of a harvest does, and what it has open."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sae_core import harvest as sweep
from sae_core import heads
from sae_core.activations import Activations
from sae_core.config import HarvestJob
from sae_core.progress import Progress, relayed
from server import estimates, harvest_plan
from server.db import sqlite_path
from server.estimates import Shape
from server.job_folders import left_by
from server.keeping import room
from server.store import harvests, registry, search
from server.work.opening import open_activations, open_lens, open_rows, open_sae
from server.work.run import Run

TYPICAL_L0 = 50  # of an imported SAE whose files do not say it


class Hands:
    """What a harvest's steps hold: model, SAEs, rows; opened once per attempt. Of a part, `whole` is the harvest's job."""

    def __init__(self, run: Run, cfg: HarvestJob, whole: str | None = None) -> None:
        self.run, self.cfg, worker = run, cfg, run.worker
        self.source = left_by(worker.settings.data, whole) if whole else run.folder
        with worker.db.read() as session:
            self.records = [registry.sae(session, name) for name in cfg.saes]
            self.corpus = registry.corpus(session, cfg.corpus)
            model = registry.model_by_id(session, self.records[0].model_id)
        self.lens = open_lens(run, model.name)
        self.saes = [open_sae(worker.settings.data, record, self.lens) for record in self.records]
        self.rows = open_rows(run, self.lens, cfg.corpus, cfg)
        self.activations = self._cached()
        layers = {sae.cfg.site.layer for sae in self.saes}
        swept = [estimates.Swept(sae.cfg.site.layer, sae.cfg.d_sae, sae.cfg.k or TYPICAL_L0) for sae in self.saes]
        cached = layers <= set(self.activations)
        shape = Shape.of(self.lens.info)
        run.clock = estimates.Clock(estimates.harvest_seconds(cfg.harvest, swept, cfg.rows, shape, worker.speed, cached=cached))
        self._need_room()
        self.files = sweep.files_of(run.folder, len(self.saes))
        self.n_rows = sweep.swept_rows(self.rows, cfg.harvest)
        self.shards = sweep.shards(self.n_rows, cfg.harvest)
        self.phase = run.job.config.get("phase")  # of a part; the whole has none
        # What a scan keeps of the streams goes where it writes; a visit reads what all scans have kept.
        kept = self.source if self.phase == "visit" else run.folder
        self.streams = sweep.streams_of(kept, self.lens, self.saes, self.rows, cfg.harvest, self.activations)
        self._seen, self._counted = sweep.Seen(self.saes), set[int]()
        self._selections: list[sweep.Selection] = []
        self._visits: list[range] = []
        self._table: tuple[int, sweep.FeatureTable] | None = None

    def _need_room(self) -> None:
        """Refuse what will not fit; the database's part only where the database is in the data folder."""
        info, how, settings = self.lens.info, self.cfg.harvest, self.run.worker.settings
        need = 0.0
        for sae in self.saes:
            size = harvest_plan.Size(
                min(how.tokens, len(self.rows.train) * self.rows.context), self.rows.context, sae.cfg.d_sae,
                sae.cfg.k or TYPICAL_L0, sae.cfg.d_in, info.d_model, info.n_heads, info.d_vocab,
            )  # fmt: skip
            parts = harvest_plan.harvest_plan(how, size, None).disk
            need += sum(taken for part, taken in parts.items() if part != "database" or sqlite_path(settings.url))
        room.need_room(settings, need - room.size_of(self.run.folder), "This harvest")

    def _cached(self) -> dict[int, Activations]:
        """By layer, what is left on disk of activations of the same rows."""
        found: dict[int, Activations] = {}
        for record in self.records:
            train = record.config.train
            if train is not None and train.corpus == self.cfg.corpus and train.rows == self.cfg.rows:
                parent = left_by(self.run.worker.settings.data, record.job_id or "none")
                held = open_activations(self.run, parent, self.lens, self.rows, train)
                if held is not None:
                    found.setdefault(train.site.layer, held)
        return found

    def count(self, phase: str) -> int:
        """Into how much a phase is cut."""
        return len(self.shards) if phase == "scan" else len(self.visits)

    @property
    def visits(self) -> list[range]:
        """The parts of the visit."""
        if not self._visits:
            self._visits = sweep.visit_parts(self.selections, self.cfg.harvest)
        return self._visits

    def so_far(self, phase: str) -> Progress:
        """How much of a phase is done, whoever did it."""
        of_one, unit = (self.rows.context, "tokens") if phase == "scan" else (1, "rows")
        sizes = [len(one) * of_one for one in (self.shards if phase == "scan" else self.visits)]
        done = sum(size for number, size in enumerate(sizes) if self.there(phase, number))
        return Progress(phase, done, sum(sizes), unit)

    def paths(self, phase: str, number: int) -> list[Path]:
        """What a shard of the scan, or a part of the visit, leaves: a file for each SAE."""
        return [files.shard(self.shards[number]) if phase == "scan" else files.part(number) for files in self.files]

    def there(self, phase: str, number: int) -> bool:
        """Whether it has been done."""
        return all(path.exists() for path in self.paths(phase, number))

    def do(self, phase: str, number: int) -> None:
        """Do it."""
        if phase == "scan":
            self.scan(number)
        else:
            self.visit(number, self.visits[number])

    def gather(self, part: str) -> None:
        """Move into our folder what a part has made in its own, unless it is here already."""
        made = left_by(self.run.worker.settings.data, part)
        for path in sorted(made.rglob("*")) if made.exists() else ():
            if path.is_file() and path.suffix != ".aside":
                place = self.run.folder / path.relative_to(made)
                place.parent.mkdir(exist_ok=True)
                if not place.exists():
                    path.rename(place)
        shutil.rmtree(self.run.worker.settings.data / "jobs" / part, ignore_errors=True)

    def scan(self, number: int) -> None:
        """One shard of the sweep."""
        context, shard = self.rows.context, self.shards[number]
        for other in range(number):  # what was swept before, here or elsewhere, is counted for those who watch
            if other not in self._counted and self.there("scan", other):
                self._seen.add(self.paths("scan", other))
                self._counted.add(other)
        paths = self.paths("scan", number)
        within = _within(self.so_far("scan").done, self.n_rows * context)
        how = self.cfg.harvest, paths, self.activations, self._seen, self.streams
        reports = sweep.scan_shard(self.lens, self.saes, self.rows, shard, *how)
        # What was counted so far is one point, which each report replaces.
        self.run.follow(relayed(reports, lambda report: replace(within(report), step=0)))
        self._counted.add(number)

    def choose(self, index: int) -> None:
        """Merge an SAE's shards and choose its examples."""
        self.run.report(Progress("choose", index, len(self.saes), "SAEs"))
        files = self.files[index]
        paths = [files.shard(shard) for shard in self.shards]
        sweep.choose(paths, self.saes[index], self.rows, self.cfg.harvest, files.selection)

    @property
    def selections(self) -> list[sweep.Selection]:
        """What was chosen of each SAE, without the sums, of which there are many."""
        if not self._selections:
            chosen = [files.selection for files in sweep.files_of(self.source, len(self.saes))]
            self._selections = [sweep.Selection.load(path).without_sums() for path in chosen]
        return self._selections

    def visit(self, number: int, part: range) -> None:
        """The examples of one part, in fp32."""
        paths, selections = [files.part(number) for files in self.files], self.selections
        reports = sweep.visit(self.lens, self.saes, self.rows, selections, part, self.cfg.harvest, paths, self.streams)
        before = self.so_far("visit")
        self.run.follow(relayed(reports, _within(before.done, before.total)))

    def features(self, index: int, n_parts: int) -> None:
        """What is said of every feature of an SAE."""
        self.run.report(Progress("features", index, len(self.saes), "SAEs"))
        files = self.files[index]
        chosen, parts = sweep.Selection.load(files.selection), self.parts(index, n_parts)
        self._table = index, sweep.features(self.lens, self.saes[index], chosen, parts, self.cfg.harvest, files.features)

    def parts(self, index: int, n_parts: int) -> list[Path]:
        """An SAE's files of the visit."""
        return [self.files[index].part(number) for number in range(n_parts)]

    def table(self, index: int) -> sweep.FeatureTable:
        """An SAE's features, as `features` left them."""
        if self._table is None or self._table[0] != index:
            self._table = index, sweep.FeatureTable.load(self.files[index].features)
        return self._table[1]

    def begin(self, index: int) -> int:
        """The harvest's row; its id."""
        return harvests.begin(
            self.run.worker.db,
            sae_id=self.records[index].id,
            corpus_id=self.corpus.id,
            job_id=self.run.id,
            config=self.cfg.harvest.model_dump(mode="json"),
            totals=self.table(index).totals,
            fence=self.run.fence,
        )

    def write_features(self, index: int, harvest_id: int, n_parts: int) -> None:
        """Every feature of an SAE."""
        self._writes(index, 0, n_parts)
        harvests.write_features(self.run.worker.db, harvest_id, self.table(index), self.run.fence)

    def write_heads(self, index: int, harvest_id: int) -> None:
        """What the features of an SAE say of each head."""
        found = heads.summaries(self.table(index), self.saes[index])
        harvests.write_heads(self.run.worker.db, harvest_id, found, self.run.fence)

    def write_part(self, index: int, harvest_id: int, number: int, n_parts: int) -> None:
        """The examples of one part."""
        self._writes(index, number + 1, n_parts)
        rows = sweep.row_records(self.table(index), self.parts(index, n_parts), number)
        harvests.write_part(self.run.worker.db, harvest_id, number, rows, self.run.fence)

    def search(self, harvest_id: int) -> None:
        """What is searched of an SAE's features."""
        search.write(self.run.worker.db, harvest_id, self.run.fence)

    def _writes(self, index: int, done: int, n_parts: int) -> None:
        each = n_parts + 1
        self.run.report(Progress("write", index * each + done, len(self.saes) * each, "parts"))

    def publish(self, index: int, harvest_id: int, n_parts: int) -> None:
        """Readers see it from now on."""
        settings, name = self.run.worker.settings, self.records[index].name
        harvests.publish(self.run.worker.db, harvest_id, n_parts, self.run.fence)
        self.run.say(f"Published: {settings.address}/saes/{name}.")


def _within(before: int, total: int) -> Callable[[Progress], Progress]:
    """A part's reports as reports of the whole, `before` of which was done already."""
    return lambda report: replace(report, done=before + report.done, total=total)
