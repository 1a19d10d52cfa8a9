"""A backup is of one moment, whole or not there, and what is put back shows the same pages."""

import json
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from sae_core.errors import DatabaseTooNew, DiskFull, MachineError, UsageError
from server.db import Database
from server.jobs import Jobs
from server.keeping import backup
from server.settings import Settings
from server.store import jobs as store
from server.tables import Context, Job, JobPoint
from tests.keeping.conftest import home, pages


def test_a_restored_server_shows_the_same_pages(filled: Settings, empty: Settings, tmp_path: Path) -> None:
    before = pages(filled)
    where, made = backup.backup(filled, tmp_path / "backups")
    assert where.parent == tmp_path / "backups"
    assert made.notes == []
    assert set(made.files) == {"saes/smollm2-l17/sae.safetensors", "saes/smollm2-l17/cfg.json"}
    backup.restore(empty, tmp_path / "backups")
    after = pages(empty)
    assert {path: text for path, text in after.items() if path not in ("/", "/jobs")} == {
        path: text for path, text in before.items() if path not in ("/", "/jobs")
    }
    weights = "saes/smollm2-l17/sae.safetensors"
    assert (empty.data / weights).read_bytes() == (filled.data / weights).read_bytes()


def test_a_tar_file_holds_the_same(filled: Settings, empty: Settings, tmp_path: Path) -> None:
    where, _ = backup.backup(filled, tmp_path / "one.tar")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(UsageError, match="there already"):
        backup.backup(filled, where)
    assert backup.verify(where).revision
    backup.restore(empty, where)
    assert pages(empty)["/saes/smollm2-l17/features/0"] == pages(filled)["/saes/smollm2-l17/features/0"]


def test_what_was_deleted_is_not_in_the_backup_and_a_second_one_adds_little(filled: Settings, tmp_path: Path) -> None:
    stray = filled.data / "saes" / "nobody" / "sae.safetensors"
    stray.parent.mkdir()
    stray.write_bytes(b"x")
    folder = tmp_path / "backups"
    _, first = backup.backup(filled, folder)
    blobs = {path: path.stat().st_mtime_ns for path in (folder / "files").glob("*/*")}
    assert len(blobs) == len(first.files) == 2
    backup.backup(filled, folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "files").glob("*/*")} == blobs
    shutil.rmtree(filled.data / "saes" / "smollm2-l17")
    _, third = backup.backup(filled, folder, keep=1)
    assert third.notes == [f"The files of the SAE smollm2-l17 are not in {filled.data / 'saes' / 'smollm2-l17'}."]
    assert len(backup.snapshots(folder)) == 1
    assert list((folder / "files").glob("*/*")) == []


def test_a_backup_taken_while_things_are_written_is_of_one_moment(filled: Settings, empty: Settings, tmp_path: Path) -> None:
    """A writer adds two things in each transaction that must be equal in number; and only one of them may be one ahead of
    what was there when the copy began."""
    database, stop = Database(filled.url), threading.Event()
    written = [0]

    def write() -> None:
        while not stop.is_set():
            with database.write() as session:
                n = written[0] = written[0] + 1
                session.add(Job(id=f"w-{n}", kind="train", title="t", config={}, status="done"))
                session.flush()
                session.add(JobPoint(job_id=f"w-{n}", run=0, step=n, values={"loss": 1.0}))
                session.add(Context(harvest_id=1, row=100_000 + n, tokens=b"x" * 4000, texts=["tide"] * 200))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while written[0] < 20:
            pass
        for n in range(3):
            before = written[0]
            _, made = backup.backup(filled, tmp_path / f"{n}.tar")
            held = made.counts["headscope"]
            assert before <= held["job_point"] + 1
        assert written[0] > before
    finally:
        stop.set()
        thread.join()
        database.close()
    backup.restore(empty, tmp_path / "2.tar")
    restored = Database(empty.url)
    with restored.read() as session:
        points = set(session.scalars(sa.select(JobPoint.job_id).where(JobPoint.job_id.startswith("w-"))))
        there = set(session.scalars(sa.select(Job.id).where(Job.id.startswith("w-"))))
        rows = session.scalar(sa.select(sa.func.count()).where(Context.row > 100_000))
    restored.close()
    assert points == there
    assert rows == len(there)


def test_nothing_is_overwritten(filled: Settings, empty: Settings, tmp_path: Path) -> None:
    backup.backup(filled, tmp_path / "backups")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        backup.restore(filled, tmp_path / "backups")
    (empty.data / "saes" / "mine").mkdir(parents=True)
    with pytest.raises(UsageError, match="saes already"):
        backup.restore(empty, tmp_path / "backups")
    shutil.rmtree(empty.data / "saes")
    if empty.database_url:
        database = Database(empty.url)
        with database.write() as session:
            session.execute(sa.text("create table mine (id int)"))
        database.close()
        with pytest.raises(UsageError, match=r"not empty \(it has public.mine\)"):
            backup.restore(empty, tmp_path / "backups")


@pytest.mark.parametrize("hurt", ["blob", "gone", "database", "manifest", "count"])
def test_a_damaged_backup_is_refused_and_leaves_nothing(filled: Settings, empty: Settings, tmp_path: Path, hurt: str) -> None:
    where, _ = backup.backup(filled, tmp_path / "backups")
    manifest = where / "manifest.json"
    if hurt == "blob":
        blob = max((tmp_path / "backups" / "files").glob("*/*"), key=lambda path: path.stat().st_size)
        blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    elif hurt == "gone":
        next((tmp_path / "backups" / "files").glob("*/*")).unlink()
    elif hurt == "database":
        path = where / ("database.dump" if filled.database_url else "headscope.db")
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif hurt == "manifest":
        manifest.write_text(manifest.read_text()[:-30])
    else:
        found = json.loads(manifest.read_text())
        found["counts"]["headscope"]["context"] += 1
        manifest.write_text(json.dumps(found))
    if hurt != "count":
        with pytest.raises(UsageError, match="damaged"):
            backup.verify(tmp_path / "backups")
    with pytest.raises(UsageError, match="damaged"):
        backup.restore(empty, tmp_path / "backups")
    assert list(empty.data.iterdir()) == []
    if empty.database_url and hurt != "count":
        with backup._connected(empty.url) as ask:
            assert ask("select count(*) from pg_tables where schemaname = 'public'") == [(0,)]


def test_a_newer_or_another_kind_of_backup_is_refused(filled: Settings, tmp_path: Path, postgres: sa.URL) -> None:
    where, _ = backup.backup(filled, tmp_path / "backups")
    other = None if filled.database_url else postgres.render_as_string(hide_password=False)
    elsewhere = Settings(data=tmp_path / "other", cache=tmp_path / "cache", database_url=other).prepare()
    with pytest.raises(UsageError, match="headscope migrate"):
        backup.restore(elsewhere, tmp_path / "backups")
    found = json.loads((where / "manifest.json").read_text())
    (where / "manifest.json").write_text(json.dumps(found | {"revision": "9999"}))
    same = filled.model_copy(update={"data": tmp_path / "same"}).prepare()
    with pytest.raises(DatabaseTooNew, match="schema 9999"):
        backup.restore(same, tmp_path / "backups")


LIMITED = """
import resource, sys
from pathlib import Path
from sae_core.errors import DiskFull
from server.keeping import backup
from server.settings import Settings
data, target, most, url = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), int(most)))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
settings = Settings(data=Path(data), cache=Path(data) / "cache", database_url=url or None)
try:
    backup.backup(settings, Path(target))
except DiskFull as error:
    print("full:", error)
"""


@pytest.mark.parametrize("name", ["backups", "one.tar"])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_disk_that_fills_up_leaves_nothing_half(filled: Settings, tmp_path: Path, name: str, share: float) -> None:
    size = max(4_000_000, int(backup._expected(filled, None)))
    (filled.data / "saes" / "smollm2-l17" / "cfg.json").write_bytes(b"y" * size)  # the largest file, copied last but one
    most = int(share * size)
    target = tmp_path / "target" / name
    target.parent.mkdir()
    command = [sys.executable, "-c", LIMITED, str(filled.data), str(target), str(most), filled.database_url or ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("full: No room is left"), done.stderr
    assert list(target.rglob("*") if target.exists() else ()) == []
    assert [path for path in target.parent.iterdir() if path != target] == []


def test_a_backup_that_will_not_fit_is_refused_with_figures(filled: Settings, tmp_path: Path) -> None:
    greedy = filled.model_copy(update={"disk_reserve_gb": 1e6})
    with pytest.raises(DiskFull, match=r"This backup needs about .* MB .* 1,000,000.0 GB of which stay free"):
        backup.backup(greedy, tmp_path / "backups")
    assert not (tmp_path / "backups").exists()


def test_without_pg_dump_a_sentence_says_what_to_install(
    filled: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if filled.database_url:
        with pytest.raises(MachineError, match="postgresql-client"):
            backup.backup(filled, tmp_path / "backups")
    else:
        backup.backup(filled, tmp_path / "backups")


def test_open_jobs_are_in_the_queue_of_a_restored_server(filled: Settings, empty: Settings, tmp_path: Path) -> None:
    database = Database(filled.url)
    queue = Jobs(filled, database)
    with database.write() as session:
        store.create(session, "study-q", "study", "waits", {})
        store.create(session, "study-r", "study", "runs", {})
    queue.release()
    with database.write() as session:
        attempt = store.start_attempt(session, "study-r", "worker-7")
        store.beat(session, "worker-7", "cpu", 1)
    queue.client.cancel_workflow("study-q")  # as if the queue had been read at another moment
    queue.close()
    database.close()
    backup.backup(filled, tmp_path / "b.tar")
    backup.restore(empty, tmp_path / "b.tar")
    database = Database(empty.url)
    queue = Jobs(empty, database)
    waiting = {flow.workflow_id for flow in queue.client.list_workflows(status="ENQUEUED")}
    assert {"study-q", "study-r"} <= waiting
    assert queue.get("study-r").status == "queued"
    assert queue.get("study-r").attempt == attempt + 1
    with database.read() as session:
        assert store.workers(session) == []
    queue.close()
    database.close()


def test_a_tar_names_nothing_outside_a_data_folder(tmp_path: Path) -> None:
    settings = home(tmp_path / "data")
    where, _ = backup.backup(settings, tmp_path / "backups")
    found = json.loads((where / "manifest.json").read_text())
    found["files"]["../out"] = next(iter(found["files"].values()))
    (where / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(UsageError, match="no place in a data folder"):
        backup.restore(Settings(data=tmp_path / "new", cache=tmp_path / "cache").prepare(), tmp_path / "backups")
    assert not (tmp_path / "out").exists()
    with tarfile.open(tmp_path / "x.tar", "w"):
        pass
    with pytest.raises(UsageError, match="no backup"):
        backup.verify(tmp_path / "x.tar")
