"""Every environment variable, documented once. Refuses combinations that would be unsafe. No torch."""

import errno
import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

import sqlalchemy as sa
from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from sae_core.errors import DataFolderNotWritable, DiskFull, UsageError


def _xdg(variable: str, fallback: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / fallback) / "headscope"


class Settings(BaseSettings):
    """Read from `HEADSCOPE_*`; a value given on the command line wins."""

    model_config = SettingsConfigDict(env_prefix="HEADSCOPE_", use_attribute_docstrings=True, extra="ignore")

    data: Path = _xdg("XDG_DATA_HOME", ".local/share")
    """Folder of the databases, SAEs, rows and running jobs. Must be on a local disk when the database is SQLite."""
    cache: Path = _xdg("XDG_CACHE_HOME", ".cache")
    """Folder of what can be fetched or made again: downloads and converted models."""
    database_url: str | None = None
    """SQLAlchemy address of the database; unset takes SQLite in the data folder."""
    host: str = "127.0.0.1"
    """Address that the web listens on."""
    port: int = 8000
    """Port that the web listens on."""
    engine_port: int = 0
    """Port of the engine on 127.0.0.1; 0 takes the web's port + 1."""
    engine_secret: SecretStr | None = None
    """Secret shared by web and engine; unset makes one and keeps it in the data folder, readable by its owner only."""
    engine_idle_seconds: float = 600.0
    """Seconds without a question after which the engine gives its models' memory back."""
    engine_max_tokens: int = 512
    """Most tokens of a text that the engine takes."""
    device: str = "auto"
    """Where models run: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the first GPU, else the CPU."""
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that a worker trains in, started by torchrun, a GPU each. The results do not depend on it."""
    worker_id: str = "worker-0"
    """This worker's slot. Each live worker needs its own; a restarted worker takes its old one and goes on with its jobs."""
    hf_token_file: Path | None = None
    """File with a Hugging Face token, for gated models; else the environment's `HF_TOKEN` is used."""

    wandb: str | None = None
    """Project of Weights & Biases to which workers send the curves of trainings; unset sends nothing anywhere."""

    webhook: str | None = None
    """Address (http or https) to which a worker POSTs JSON when a job has ended; unset calls nobody."""

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.host not in ("127.0.0.1", "localhost", "::1"):
            raise UsageError(
                f"Headscope has no login yet, so it will not listen on {self.host}; use 127.0.0.1 and a tunnel.", field="host"
            )
        called = urlsplit(self.webhook or "http://nowhere")
        if called.scheme not in ("http", "https") or not called.hostname:
            raise UsageError("The webhook must be an address that begins with http:// or https://.", field="webhook")
        return self

    @property
    def url(self) -> sa.URL:
        """Address of the database."""
        return sa.make_url(self.database_url or f"sqlite:///{self.data / 'headscope.db'}")

    @property
    def jobs_url(self) -> str:
        """Address of DBOS's own tables: beside the data on PostgreSQL, in a file of their own on SQLite."""
        if self.url.get_backend_name() == "sqlite":
            return f"sqlite:///{self.data / 'jobs.db'}"
        return self.url.render_as_string(hide_password=False)

    @property
    def engine_url(self) -> str:
        """Where the web finds the engine."""
        return f"http://127.0.0.1:{self.engine_port or self.port + 1}"

    @cached_property
    def secret(self) -> str:
        """The secret that web and engine share."""
        if self.engine_secret:
            return self.engine_secret.get_secret_value()
        path = self.data / "engine.secret"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return path.read_text()
        with os.fdopen(handle, "w") as file:
            file.write(os.urandom(32).hex())
        return path.read_text()

    def prepare(self) -> Self:
        """Make the data and cache folders and see that they can be written; a sentence when they cannot."""
        for folder in (self.data, self.cache):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=folder) as file:
                    file.write(b"x" * 4096)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise DiskFull(
                        f"No room is left in {folder}; free some space or set HEADSCOPE_DATA to another disk."
                    ) from error
                raise DataFolderNotWritable(
                    f"{folder} cannot be written ({error.strerror}); set HEADSCOPE_DATA and HEADSCOPE_CACHE to folders of yours."
                ) from error
        return self
