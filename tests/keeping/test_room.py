"""What will not fit is refused with figures; what meets the reserve stops cleanly and can be run again. On real small disks."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_core.errors import DiskFull
from server.keeping import backup, room
from server.settings import Settings
from server.store import jobs as store
from server.worker import Worker
from tests.core.tiny_models import save_tiny
from tests.jobs.conftest import Home, make_home, start, tiny_config, write_text

MB = 1_000_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a disk of its own needs root and a kernel that lets it be mounted")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def on(disk: Path, tmp_path: Path, **more: object) -> Home:
    """A home whose data folder is on the disk, with a reserve of 4 MB."""
    made = make_home(disk, save_tiny("llama", tmp_path / "tiny-llama"), write_text(tmp_path / "words.txt"))
    made.settings = made.settings.model_copy(
        update={"disk_reserve_gb": 0.004, "device": "cpu", "cache": tmp_path / "cache", **more}
    )
    return made


def working(made: Home) -> Worker:
    worker = Worker(made.settings, made.db)
    start(worker)
    return worker


def fill(disk: Path, leave: int) -> Path:
    """Fill the disk up, but for `leave` bytes."""
    path = disk / "ballast"
    with path.open("wb") as file:
        while (free := shutil.disk_usage(disk).free) > leave + 4096:
            file.write(b"x" * min(free - leave, MB))
            file.flush()
    return path


def test_a_run_that_will_not_fit_is_refused_at_its_start_with_figures(disk: Path, tmp_path: Path) -> None:
    made = on(disk, tmp_path)
    worker = working(made)
    try:
        job = made.jobs.enqueue_train(tiny_config(tokens=3_000_000, passes=1))
        assert made.wait(job) == "failed"
        assert "This run needs about" in (made.error(job) or "")
        assert "4.0 MB of which stay free (HEADSCOPE_DISK_RESERVE_GB)" in (made.error(job) or "")
        assert room.size_of(made.settings.data / "rows") < MB, "nothing was cut before"
    finally:
        worker.close()
        made.jobs.close()
        made.db.close()


def test_a_run_that_meets_the_reserve_stops_keeps_its_checkpoint_and_goes_on(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = on(disk, tmp_path)
    job = made.jobs.enqueue_train(tiny_config(tokens=8_192, passes=4, harvests=()))
    real, ballasts = room.watch, list[Path]()

    def meanwhile(settings: Settings) -> None:
        if not ballasts and list(made.folder(job).glob("runs/*/checkpoints/step-*")):
            ballasts.append(fill(disk, 3 * MB))
        real(settings)

    monkeypatch.setattr(room, "watch", meanwhile)  # the moment is what is chosen here, not what happens then
    monkeypatch.setattr("server.work.run.WATCH_SECONDS", 0.0)
    worker = working(made)
    try:
        assert made.wait(job, "failed", "done") == "failed"
        assert "less than the 4.0 MB that stay free" in (made.error(job) or "")
        steps = sorted(path.name for path in made.folder(job).glob("runs/*/checkpoints/step-*"))
        assert steps
        ballasts[0].unlink()
        made.jobs.retry(job)
        assert made.wait(job) == "done", made.error(job)
        with made.db.read() as session:
            said = [line.text for line in store.log_lines(session, job)]
        assert said.count("Training.") == 2
        assert said.count("Reading attention outputs.") == 1, "it went on from what it had"
    finally:
        worker.close()
        made.jobs.close()
        made.db.close()


def test_a_backup_onto_a_disk_that_fills_up_leaves_nothing_there(disk: Path, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "data", cache=tmp_path / "cache", disk_reserve_gb=0).prepare()
    made = make_home(tmp_path, save_tiny("llama", tmp_path / "tiny-llama"), write_text(tmp_path / "words.txt"))
    made.jobs.close()
    made.db.close()
    settings = made.settings.model_copy(update={"disk_reserve_gb": 0.0})
    # What is asked beforehand is right, so the disk fills up while the backup is written.
    expected = backup._expected(settings, None)
    ballast = fill(disk, int(expected) + 64_000)
    real = backup._from_sqlite

    def meanwhile(settings: Settings, aside: Path) -> backup.Manifest:
        with ballast.open("ab") as file:
            file.write(b"x" * max(0, shutil.disk_usage(disk).free - 40_000))
        return real(settings, aside)

    backup._from_sqlite = meanwhile  # type: ignore[assignment] # the moment is what is chosen here, not what happens then
    try:
        for name in ("folder", "one.tar"):
            with pytest.raises(DiskFull, match="No room is left"):
                backup.backup(settings, disk / "backups" / name)
            assert [path.name for path in disk.iterdir()] in (["ballast"], ["backups", "ballast"], ["ballast", "backups"])
            assert not list((disk / "backups").rglob("*")) if (disk / "backups").exists() else True
            with ballast.open("r+b") as file:
                file.truncate(int(ballast.stat().st_size - expected - 128_000))
    finally:
        backup._from_sqlite = real


def test_a_quota_is_kept(settings: Settings) -> None:
    bounded = settings.model_copy(update={"disk_quota_gb": 0.01, "disk_reserve_gb": 0.0})
    (settings.data / "saes").mkdir()
    (settings.data / "saes" / "x").write_bytes(b"x" * 6 * MB)
    room.need_room(bounded, 3 * MB)
    with pytest.raises(DiskFull, match=r"about 5.0 MB, and .* holds 6.0 MB of the 10.0 MB that it may"):
        room.need_room(bounded, 5 * MB)


def test_what_is_free_is_less_by_the_reserve(settings: Settings) -> None:
    free = shutil.disk_usage(settings.data).free
    room.need_room(settings.model_copy(update={"disk_reserve_gb": 0.0}), free / 2)
    with pytest.raises(DiskFull):
        room.need_room(settings.model_copy(update={"disk_reserve_gb": 0.6 * free / 1e9}), free / 2)
    room.watch(settings.model_copy(update={"disk_reserve_gb": 0.5 * free / 1e9}))
    with pytest.raises(DiskFull, match="so the job stopped"):
        room.watch(settings.model_copy(update={"disk_reserve_gb": 1.5 * free / 1e9}))
