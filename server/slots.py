"""Names that one process at a time has, by a lock on a file, so that they are free once it is gone."""

import fcntl
from collections.abc import Sequence
from typing import IO

from sae_core.errors import SlotTaken
from server import jobs
from server.settings import Settings


class Slot:
    """A worker's name, held by a file lock as long as its process lives. A restarted worker takes its old one again."""

    def __init__(self, name: str, file: IO[str]) -> None:
        self.name, self._file = name, file

    @classmethod
    def take(cls, settings: Settings) -> "Slot":
        """The slot that the settings name; unnamed, the first one that is free."""
        named = "worker_id" in settings.model_fields_set
        names = [settings.worker_id] if named else [f"worker-{n}" for n in range(64)]
        found = cls.first(settings, names)
        if found is None:
            raise SlotTaken(f"Another worker runs as {names[0]}; give this one another name with --id.", field="id")
        return found

    @classmethod
    def first(cls, settings: Settings, names: Sequence[str]) -> "Slot | None":
        """The first of the names that is free; None where each is taken."""
        folder = settings.data / "workers"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            file = (folder / f"{jobs.slug(name)}.lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                continue
            return cls(name, file)
        return None

    def free(self) -> None:
        """Let another process have it."""
        self._file.close()
