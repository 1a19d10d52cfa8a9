"""Backups: both databases as of one moment and the files that they refer to, taken while everything runs; and back again.

    <folder>/files/ab/<sha256>            a file by what it holds, once for all snapshots
    <folder>/<time>/manifest.json         what was there: files, counts, versions; written last
                   /headscope.db, jobs.db of SQLite
                   /database.dump         of PostgreSQL, as pg_dump writes it

A `.tar` file holds one snapshot in the same layout. Everything is written aside and renamed, so what has its name is whole.
SQLite is copied by VACUUM INTO, which reads one state, leaves writers alone, and copies nothing that was deleted; PostgreSQL by
pg_dump in a snapshot that the counts and the files are read in as well. Files of SAEs and rows never change once they have their
name, so they are copied after the databases. No torch.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa

from sae_core.errors import DatabaseTooNew, DiskFull, MachineError, UsageError
from server import jobs
from server.db import Database, sqlite_path
from server.keeping import stored
from server.keeping.room import need_free, size_of, sync
from server.settings import Settings

FORMAT = 1
MANIFEST, DUMP = "manifest.json", "database.dump"
FILES = {stored.OURS: "headscope.db", stored.QUEUE: "jobs.db"}
SCHEMAS = {stored.OURS: "public", stored.QUEUE: "dbos"}
HOMES = ("saes", "transcoders", "rows")
"""Folders of the data folder that hold what the database refers to."""
NO_ROOM = (27, 28, 122)  # EFBIG, ENOSPC, EDQUOT


@dataclass
class Manifest:
    """What a snapshot holds."""

    made_at: str
    version: str
    """Of Headscope."""
    backend: str
    """sqlite or postgresql"""
    revision: str
    """Of Headscope's schema."""
    counts: dict[str, dict[str, int]]
    """Rows of every table, by database."""
    databases: dict[str, list[Any]] = field(default_factory=dict)
    """Name to [sha256, bytes]."""
    files: dict[str, list[Any]] = field(default_factory=dict)
    """Path in the data folder to [sha256, bytes]."""
    notes: list[str] = field(default_factory=list)
    """What could not be taken, in sentences."""
    format: int = FORMAT


# ------------------------------------------------------------------------------------------------------------- writing


def backup(settings: Settings, target: Path, *, keep: int | None = None) -> tuple[Path, Manifest]:
    """Write a snapshot into the folder `target`, or, where its name ends in .tar, into that file; where it is, and what it holds.

    `keep` leaves so many newest snapshots in a folder. Raises UsageError where the file is there already, DiskFull, and
    MachineError where pg_dump is missing or fails; nothing half written is left then.
    """
    to_file = target.suffix == ".tar"
    if to_file and target.exists():
        raise UsageError(f"{target} is there already; name another file.", field="target")
    if target.is_file() and not to_file:
        raise UsageError(f"{target} is a file; name a folder, or a file that ends in .tar.", field="target")
    home = target.parent if to_file else target
    made = not home.exists()
    home.mkdir(parents=True, exist_ok=True)
    try:
        need_free(settings, home, _expected(settings, None if to_file else target), "This backup")
        stamp = _free_name(home, datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ"))
        with tempfile.TemporaryDirectory(dir=home, prefix=".aside-") as held:
            aside = Path(held)
            manifest = _databases(settings, aside)
            if to_file:
                _write_tar(settings, manifest, aside, target)
                return target, manifest
            _write_folder(settings, manifest, aside, target, stamp)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"No room is left in {home} for the backup; nothing of it is left there.") from error
        raise
    finally:
        if made:
            with suppress(OSError):
                home.rmdir()
    if keep is not None:
        prune(target, keep)
    return target / stamp, manifest


def _expected(settings: Settings, folder: Path | None) -> float:
    """Bytes that a snapshot takes, at most: a folder has the files of earlier ones."""
    databases = sum(size_of(path) for path in map(sqlite_path, (settings.url, sa.make_url(settings.jobs_url))) if path)
    files = sum(size_of(settings.data / name) for name in HOMES)
    return databases + max(0, files - (size_of(folder / "files") if folder else 0))


def _free_name(folder: Path, name: str) -> str:
    return next(free for n in range(1, 1000) if not (folder / (free := name if n == 1 else f"{name}-{n}")).exists())


def _databases(settings: Settings, aside: Path) -> Manifest:
    """Copy the databases into `aside`."""
    if sqlite_path(settings.url) is not None:
        return _from_sqlite(settings, aside)
    return _from_postgresql(settings, aside)


def _from_sqlite(settings: Settings, aside: Path) -> Manifest:
    # The queue first: a job that came between the two is in ours, as queued, and is handed to the queue again.
    found: dict[str, dict[str, int]] = {}
    for name, url in ((stored.QUEUE, settings.jobs_url), (stored.OURS, settings.url)):
        path = sqlite_path(sa.make_url(url))
        assert path is not None
        copy = aside / FILES[name]
        try:
            with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
                connection.execute("vacuum into ?", (str(copy),))
        except sqlite3.OperationalError as error:
            if "full" in str(error) or "disk I/O" in str(error):
                raise OSError(28, "No space left on device", str(copy)) from error
            raise
        with stored.sqlite_file(copy) as ask:
            found[name] = stored.counts(ask)
    with stored.sqlite_file(aside / FILES[stored.OURS]) as ask:
        manifest = _manifest("sqlite", stored.revision(ask), found)
        _files(settings, ask, manifest)
    return manifest


def _from_postgresql(settings: Settings, aside: Path) -> Manifest:
    _need_program("pg_dump")
    db = Database(settings.url)
    try:
        with db.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            ask = stored.asking(connection)
            snapshot = str(ask("select pg_export_snapshot()")[0][0])
            found = {name: stored.counts(ask, schema=schema) for name, schema in SCHEMAS.items()}
            manifest = _manifest("postgresql", stored.revision(ask), found)
            _files(settings, ask, manifest)
            where = ("--format=custom", "--no-owner", "--no-privileges", f"--snapshot={snapshot}", f"--file={aside / DUMP}")
            _postgres(settings.url, "pg_dump", *where)
    finally:
        db.close()
    return manifest


def _manifest(backend: str, revision: str, counts: dict[str, dict[str, int]]) -> Manifest:
    return Manifest(datetime.now(UTC).isoformat(timespec="seconds"), version("headscope"), backend, revision, counts)


def _files(settings: Settings, ask: stored.Ask, manifest: Manifest) -> None:
    """Note the files that the database refers to: SAEs, transcoders, and the rows of its corpora."""
    for sae in stored.saes(ask):
        folder = settings.data / sae.folder
        if not folder.resolve().is_relative_to(settings.data.resolve()):
            manifest.notes.append(f"The SAE {sae.name} lies outside the data folder, in {folder}; keep that folder yourself.")
        elif not _note(settings.data, folder, manifest):
            manifest.notes.append(f"The files of the SAE {sae.name} are not in {folder}.")
        elif manifest.files[f"{sae.folder}/sae.safetensors"][0] != sae.sha256:
            manifest.notes.append(f"The weights of the SAE {sae.name} in {folder} are not those that were trained.")
    for one in stored.transcoders(ask):
        if not _note(settings.data, settings.data / one.file, manifest):
            manifest.notes.append(f"The transcoder of layer {one.layer} of {one.model} is not in {settings.data / one.file}.")
        elif manifest.files[one.file][0] != one.sha256:
            manifest.notes.append(f"The transcoder of layer {one.layer} of {one.model} is not the file that was imported.")
    known = [json.loads(source) if isinstance(source, str) else source for source in stored.corpora(ask)]
    for about in sorted((settings.data / "rows").glob("*/rows.json")):
        with suppress(OSError, ValueError):  # rows that are deleted or damaged are made again from the corpus
            if json.loads(about.read_text()).get("source") in known:
                _note(settings.data, about.parent, manifest)


def _note(data: Path, folder: Path, manifest: Manifest) -> bool:
    """Note a file, or every one of a folder; False when there is none, or one is lost meanwhile."""
    found = {}
    with suppress(FileNotFoundError):
        for path in sorted(path for path in [folder, *folder.rglob("*")] if path.is_file()):
            found[str(path.relative_to(data))] = list(_digest(path))
        manifest.files.update(found)
        return bool(found)
    return False


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size


def _write_folder(settings: Settings, manifest: Manifest, aside: Path, target: Path, stamp: str) -> None:
    new: list[Path] = []
    try:
        for name, (sha256, size) in list(manifest.files.items()):
            blob = target / _blob(sha256)
            if blob.exists() and blob.stat().st_size == size:
                continue
            blob.parent.mkdir(parents=True, exist_ok=True)
            part = aside / "file"
            _copy(settings.data / name, part, sha256)
            part.replace(blob)
            new.append(blob)
        _write_manifest(manifest, aside)
        sync(target)
        place = target / stamp
        part = target / f".{stamp}.part"
        part.mkdir()
        try:
            for path in aside.iterdir():
                path.replace(part / path.name)
            sync(part)
            part.rename(place)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        sync(target)
    except BaseException:
        for blob in new:
            blob.unlink(missing_ok=True)
        for folder in (*(target / "files").glob("*"), target / "files"):
            with suppress(OSError):  # which it refuses while something is in it
                folder.rmdir()
        raise


def _write_tar(settings: Settings, manifest: Manifest, aside: Path, target: Path) -> None:
    _write_manifest(manifest, aside)
    part = aside / "tar"
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in (MANIFEST, *manifest.databases):
            tar.add(aside / name, name)
            (aside / name).unlink()
        held = set[str]()
        for name, (sha256, _) in manifest.files.items():
            if sha256 not in held:
                _copy(settings.data / name, aside / "file", sha256)
                tar.add(aside / "file", _blob(sha256))
                held.add(sha256)
    sync(part)
    part.rename(target)
    sync(target.parent)


def _write_manifest(manifest: Manifest, aside: Path) -> None:
    for name in (*FILES.values(), DUMP):
        if (aside / name).exists():
            manifest.databases[name] = list(_digest(aside / name))
            sync(aside / name)
    path = aside / MANIFEST
    path.write_text(json.dumps(vars(manifest), indent=1))
    sync(path)


def _blob(sha256: str) -> str:
    return f"files/{sha256[:2]}/{sha256}"


def _copy(source: Path, part: Path, sha256: str) -> None:
    """Copy a file, and see that the copy is what was noted."""
    shutil.copyfile(source, part)
    sync(part)
    if _digest(part)[0] != sha256:
        raise MachineError(f"{source} changed while it was copied, or the disk does not keep what is written; back up again.")


def prune(folder: Path, keep: int) -> list[str]:
    """Leave the `keep` newest snapshots of a folder, and the files that they hold; the names of those that went."""
    names = snapshots(folder)
    gone = names[: max(0, len(names) - max(keep, 1))]
    for name in gone:
        shutil.rmtree(folder / name)
    held = {sha256 for name in snapshots(folder) for sha256, _ in _read_manifest(_Folder(folder, name)).files.values()}
    for blob in (folder / "files").glob("*/*"):
        if blob.name not in held:
            blob.unlink()
    return gone


def snapshots(folder: Path) -> list[str]:
    """Names of a folder's snapshots, oldest first."""
    return sorted(path.parent.name for path in folder.glob(f"[!.]*/{MANIFEST}"))


# ------------------------------------------------------------------------------------------------------------- reading


class _Folder:
    """A snapshot in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def open(self, name: str) -> IO[bytes]:
        place = self.folder / name if name.startswith("files/") else self.folder / self.name / name
        return place.open("rb")


class _Tar:
    """A snapshot in a .tar file."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar

    def open(self, name: str) -> IO[bytes]:
        try:
            found = self.tar.extractfile(name)
        except KeyError:
            found = None
        if found is None:
            raise FileNotFoundError(2, "No such file in the backup", name)
        return found


@contextmanager
def _opened(place: Path, name: str | None) -> Iterator[_Folder | _Tar]:
    if place.is_file():
        try:
            with tarfile.open(place, "r:") as tar:
                yield _Tar(tar)
        except tarfile.TarError as error:
            raise UsageError(f"{place} is no whole backup: {error}.", field="source") from error
        return
    if not place.is_dir():
        raise UsageError(f"There is no backup at {place}; name the folder or the .tar file that `headscope backup` wrote.")
    if (place / MANIFEST).exists():  # the snapshot itself was named
        place, name = place.parent, place.name
    names = snapshots(place)
    if not names or (name is not None and name not in names):
        raise UsageError(f"{place} holds no snapshot{f' {name}' if name else ''}; it has {', '.join(names) or 'none'}.")
    yield _Folder(place, name or names[-1])


def _read_manifest(source: _Folder | _Tar) -> Manifest:
    try:
        with source.open(MANIFEST) as file:
            found = json.load(file)
        if found["format"] > FORMAT:
            raise UsageError("This backup was written by a newer Headscope; install that version to restore it.", field="source")
        return Manifest(**found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"This is no backup, or its {MANIFEST} is damaged ({error}).", field="source") from error


def verify(place: Path, snapshot: str | None = None) -> Manifest:
    """See that a snapshot is whole, file by file; what it holds. Raises UsageError naming what is damaged."""
    with _opened(place, snapshot) as source:
        manifest = _read_manifest(source)
        for name, (sha256, _) in _contents(manifest):
            _take(source, name, sha256, None)
    return manifest


def _contents(manifest: Manifest) -> Iterator[tuple[str, list[Any]]]:
    yield from manifest.databases.items()
    yield from ((_blob(about[0]), about) for about in manifest.files.values())


def _take(source: _Folder | _Tar, name: str, sha256: str, to: Path | None) -> None:
    """Read a file of the backup, into `to` where it is given, and see that it is what was written."""
    digest = hashlib.sha256()
    try:
        with source.open(name) as file, (to or Path(os.devnull)).open("wb") as out:
            while part := file.read(1 << 20):
                digest.update(part)
                out.write(part)
    except FileNotFoundError as error:
        raise UsageError(f"The backup is damaged: {name} is missing.", field="source") from error
    if digest.hexdigest() != sha256:
        raise UsageError(f"The backup is damaged: {name} is not what was written; take another snapshot.", field="source")
    if to is not None:
        sync(to)


def restore(settings: Settings, place: Path, *, snapshot: str | None = None) -> Manifest:
    """Put a snapshot back into the data folder and, of PostgreSQL, the database of the settings, both empty; what it held.

    Everything is checked before the first of it has its name: hashes, counts, the schema's version. Raises UsageError where
    something would be overwritten or the backup is of another kind of database, DatabaseTooNew, and DiskFull.
    """
    data = settings.data
    with _opened(place, snapshot) as source:
        manifest = _read_manifest(source)
        _check_fits(settings, manifest)
        sizes = sum(about[1] for _, about in _contents(manifest))
        need_free(settings, data, sizes, "This backup")
        with tempfile.TemporaryDirectory(dir=data, prefix=".restore-") as held:
            aside = Path(held)
            for name, (sha256, _) in manifest.files.items():
                to = aside / "files" / name
                if not to.resolve().is_relative_to((aside / "files").resolve()):
                    raise UsageError(f"The backup is damaged: {name} is no place in a data folder.", field="source")
                to.parent.mkdir(parents=True, exist_ok=True)
                _take(source, _blob(sha256), sha256, to)
            for name, (sha256, _) in manifest.databases.items():
                _take(source, name, sha256, aside / name)
            if manifest.backend == "sqlite":
                _check_sqlite(aside, manifest)
            _put(settings, manifest, aside)
    _go_on(settings)
    return manifest


def _check_fits(settings: Settings, manifest: Manifest) -> None:
    here = settings.url.get_backend_name()
    if here != manifest.backend:
        raise UsageError(
            f"This backup is of {manifest.backend}, and HEADSCOPE_DATABASE_URL names {here}; restore it into {manifest.backend}, "
            "then `headscope migrate` moves it.",
            field="source",
        )
    db = Database(sa.make_url("sqlite://"))
    known = db.knows(manifest.revision)
    db.close()
    if not known:
        raise DatabaseTooNew(
            f"This backup was taken by a newer Headscope ({manifest.version}, schema {manifest.revision}); install that version."
        )
    places = [*sqlite_files(settings), *(settings.data / name for name in HOMES)]
    there = [path.name for path in places if _is_filled(path)]
    if there:
        raise UsageError(
            f"{settings.data} holds {', '.join(there)} already, and nothing is overwritten; restore into an empty data folder "
            "(HEADSCOPE_DATA or --data).",
            field="data",
        )
    if here == "postgresql":
        _need_program("pg_restore")
        with _connected(settings.url) as ask:
            filled = ask("select schemaname || '.' || tablename from pg_tables where schemaname in ('public', 'dbos') limit 3")
        if filled:
            named = ", ".join(name for (name,) in filled)
            raise UsageError(
                f"The database at {settings.url!r} is not empty (it has {named}), and nothing is overwritten; make a new one.",
                field="database_url",
            )


def sqlite_files(settings: Settings) -> list[Path]:
    """Where SQLite's two files are or would be, and their journals: an old journal beside a new file would be read into it."""
    found = [path for url in (settings.url, settings.jobs_url) if (path := sqlite_path(sa.make_url(url)))]
    return [path.with_name(path.name + end) for path in found for end in ("", "-wal", "-journal")]


def _is_filled(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _check_sqlite(aside: Path, manifest: Manifest) -> None:
    for name, counted in manifest.counts.items():
        with stored.sqlite_file(aside / FILES[name]) as ask:
            problem = ask("pragma integrity_check(1)")[0][0]
            if problem != "ok":
                raise UsageError(f"The backup is damaged: {FILES[name]} is no whole database ({problem}).", field="source")
            _check_counts(stored.counts(ask), counted)


def _check_counts(found: dict[str, int], counted: dict[str, int]) -> None:
    wrong = [f"{table} {found.get(table)} of {n}" for table, n in counted.items() if found.get(table) != n]
    if wrong:
        raise UsageError(f"The backup is damaged: rows are missing ({', '.join(wrong[:5])}).", field="source")


def _put(settings: Settings, manifest: Manifest, aside: Path) -> None:
    """Give everything its name, the databases last: without them nothing refers to a file."""
    moved: list[Path] = []
    try:
        for name in HOMES:
            if (made := aside / "files" / name).exists():
                home = settings.data / name
                if home.exists():
                    home.rmdir()  # empty, or it would have been refused
                made.rename(home)
                moved.append(home)
        if manifest.backend == "postgresql":
            # In one transaction: broken off, the database is as empty as before.
            how = ("--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges")
            _postgres(settings.url, "pg_restore", *how, str(aside / DUMP))
            with _connected(settings.url) as ask:
                for name, schema in SCHEMAS.items():
                    _check_counts(stored.counts(ask, schema=schema), manifest.counts[name])
        else:
            for name, url in ((stored.QUEUE, settings.jobs_url), (stored.OURS, settings.url)):
                path = sqlite_path(sa.make_url(url))
                assert path is not None
                (aside / FILES[name]).rename(path)
                moved.append(path)
        sync(settings.data)
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _go_on(settings: Settings) -> None:
    """Bring both schemas up to date, forget the workers that were, and put open jobs into the queue anew."""
    db = Database(settings.url)
    queue = jobs.Jobs(settings, db)
    try:
        jobs.upgrade(settings, db)
        queue.forget_workers()
        queue.settle(restored=True)
    finally:
        queue.close()
        db.close()


# ------------------------------------------------------------------------------------------------------------ PostgreSQL


@contextmanager
def _connected(url: sa.URL) -> Iterator[stored.Ask]:
    db = Database(url)
    try:
        with db.engine.connect() as connection:
            yield stored.asking(connection)
    finally:
        db.close()


def _need_program(name: str) -> None:
    if shutil.which(name) is None:
        raise MachineError(
            f"Backups of PostgreSQL need {name}, which is not installed here; install PostgreSQL's client programs, of the "
            "server's version or newer (Debian: apt-get install postgresql-client)."
        )


def _postgres(url: sa.URL, program: str, *words: str) -> None:
    """Run one of PostgreSQL's programs on the database, its password out of sight; MachineError with what it said."""
    plain = url.set(drivername="postgresql", password=None).render_as_string(hide_password=False)
    secret = {"PGPASSWORD": url.password} if url.password else {}
    done = subprocess.run(  # noqa: S603 - PostgreSQL's own program
        [shutil.which(program) or program, f"--dbname={plain}", *words],
        env={**os.environ, **secret}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        if "No space left" in done.stderr or "File too large" in done.stderr:
            raise OSError(28, "No space left on device")
        raise MachineError(f"{program} failed: {said[0].removeprefix(f'{program}: error: ').rstrip('.')}.")
