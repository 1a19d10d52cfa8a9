"""What nearly every command begins with: settings with what was given, and the data folder's database, open."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from sae_core.errors import UsageError
from server import jobs
from server.commands.printing import say
from server.db import Database, sqlite_path
from server.settings import Settings


def settings_with(**chosen: Any) -> Settings:
    """Settings of the environment, with what was given on the command line."""
    try:
        return Settings(**{name: value for name, value in chosen.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise UsageError(f"HEADSCOPE_{name.upper()}={first['input']}: {first['msg']}.", field=name) from error


@contextmanager
def opened(settings: Settings) -> Iterator[tuple[Settings, Database]]:
    """The data folder and its database, at the version that this code knows; a new SQLite file is made."""
    settings.prepare()
    db = Database(settings.url)
    try:
        path = sqlite_path(settings.url)
        if path is not None and not path.exists():
            jobs.upgrade(settings, db)
        else:
            db.wait(settings.database_wait, say)
        yield settings, db
    finally:
        db.close()
