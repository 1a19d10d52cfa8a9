"""New databases at the newest version: on SQLite a copy of the first one that was brought there, a quarter of a second sooner."""

from pathlib import Path

from server import jobs
from server.db import Database, sqlite_path
from server.settings import Settings

_made: dict[bool, dict[str, bytes]] = {}


def upgraded(settings: Settings, *, queue: bool = True) -> Database:
    """The settings' database, new and empty, at the newest version; with DBOS's beside it if a queue is needed."""
    db, path = Database(settings.url), sqlite_path(settings.url)
    if path is not None and not path.exists() and queue in _made:
        for name, made in _made[queue].items():
            (path.parent / name).write_bytes(made)
        return db
    if queue:
        jobs.upgrade(settings, db)
    else:
        db.upgrade()
    if path is not None and queue not in _made:
        db.close()  # its log of what was written becomes part of the file
        _made[queue] = {one.name: one.read_bytes() for one in _files(path.parent)}
        return Database(settings.url)
    return db


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.db"))
    assert not list(folder.glob("*.db-wal"))
    return found
