"""Every environment variable, documented once. Refuses combinations that would be unsafe. No torch."""

import errno
import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

import sqlalchemy as sa
from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from sae_core.errors import DataFolderNotWritable, DiskFull, UsageError

OWN_NAMES = ("127.0.0.1", "localhost", "testserver")
"""What this machine calls itself."""


def _xdg(variable: str, fallback: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / fallback) / "headscope"


def read_secret(path: Path, field: str) -> str:
    """What the file that the setting `field` names holds, without the newline at its end."""
    try:
        secret = path.read_text().strip()
    except OSError as error:
        raise UsageError(
            f"HEADSCOPE_{field.upper()}={path} cannot be read ({error.strerror}); name a file that can.", field=field
        ) from error
    if not secret:
        raise UsageError(f"HEADSCOPE_{field.upper()}={path} is empty; write the secret into it.", field=field)
    return secret


class Settings(BaseSettings):
    """Read from `HEADSCOPE_*`; a value given on the command line wins."""

    model_config = SettingsConfigDict(env_prefix="HEADSCOPE_", use_attribute_docstrings=True, extra="ignore")

    data: Path = _xdg("XDG_DATA_HOME", ".local/share")
    """Folder of the databases, SAEs, rows and running jobs. Must be on a local disk when the database is SQLite."""
    cache: Path = _xdg("XDG_CACHE_HOME", ".cache")
    """Folder of what can be fetched or made again: downloads and converted models."""
    database_url: str | None = None
    """SQLAlchemy address of the database; unset takes SQLite in the data folder."""
    database_password_file: Path | None = None
    """File with the password of the database's user, so that it need not stand in `database_url`."""
    database_wait: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Seconds that a process which starts waits for PostgreSQL to answer, and for somebody to bring it up to date."""
    host: str = "127.0.0.1"
    """Address that the web listens on."""
    port: int = 8000
    """Port that the web listens on."""
    web_workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that answer; one fills a core. They limit logins and live questions together."""
    web_threads: Annotated[int, Field(ge=2, le=128)] = 16
    """Requests that each of them works at at a time, with a connection to the database each."""
    web_waiting: Annotated[int, Field(ge=4)] = 256
    """Requests that each of them takes at a time, those that wait included; more are refused with 503 and Retry-After."""
    public_url: str | None = None
    """Address that people type, where it is another one than host and port: that of the proxy in front. Its host is one that
    the web answers to, and a path in it stands before every address of ours. Unset says host and port."""
    hosts: str = ""
    """Other names that the web answers to, as programs beside it use them, separated by commas; any other is refused."""
    proxies: str = "127.0.0.1"
    """Addresses and networks of the proxies whose word is taken for who a visitor is (X-Forwarded-For), separated by commas."""
    engine_port: int = 0
    """Port of the engine; 0 takes the web's port + 1."""
    engine_host: str = "127.0.0.1"
    """Address that the engine listens on, and where the web finds it when it is on another machine."""
    engine_secret: SecretStr | None = None
    """Secret shared by web and engine; unset makes one and keeps it in the data folder, readable by its owner only."""
    engine_secret_file: Path | None = None
    """File with that secret."""
    engine_idle_seconds: float = 600.0
    """Seconds without a question after which the engine gives its models' memory back."""
    engine_memory_gb: Annotated[float, Field(gt=0)] = 4.0
    """Gigabytes of weights, models and SAEs together, that the engine keeps warm. Beyond it the model that was asked for longest
    ago is unloaded; the one that is being asked stays, whatever it needs."""
    engine_max_tokens: int = 512
    """Most tokens of a text that the engine takes."""
    device: str = "auto"
    """Where models run: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the first GPU, else the CPU."""
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that a worker trains in, started by torchrun, a GPU each. The results do not depend on it."""
    worker_id: str = "worker-0"
    """This worker's slot. Each live worker needs its own; a restarted worker takes its old one and goes on with its jobs."""
    gpu_workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Workers that may share one GPU, each with a job of its own; one more refuses to start."""
    job_time_limit: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that a job may work, all attempts together, where it has no limit of its own; 0 lets it take what it takes."""
    job_tries: Annotated[int, Field(ge=0, le=20)] = 3
    """Times that a job is queued again by itself after a failure that may pass, such as a database that is away."""
    beat_seconds: Annotated[float, Field(gt=0, le=60)] = 5.0
    """Seconds between two heartbeats of a worker."""
    silent_seconds: Annotated[float, Field(gt=0, le=3600)] = 40.0
    """Seconds without a heartbeat after which other workers take a worker's jobs; the same for all workers of a database."""
    hf_token_file: Path | None = None
    """File with a Hugging Face token, for gated models; else the environment's `HF_TOKEN` is used."""

    wandb: str | None = None
    """Project of Weights & Biases to which workers send the curves of trainings; unset sends nothing anywhere."""

    disk_reserve_gb: Annotated[float, Field(ge=0)] = 1.0
    """Gigabytes of the data folder's disk that stay free: a job or a backup that would take them is refused at its start, and a
    job that meets them stops."""
    disk_quota_gb: Annotated[float | None, Field(gt=0)] = None
    """Gigabytes that the data folder may take; a job that would take more is refused at its start. Unset sets no bound."""

    accounts: bool = False
    """Ask people to log in. Needed to listen on another address than 127.0.0.1."""
    admin_password_file: Path | None = None
    """File with the password of the account `admin`, which is made with it at the start while nobody is an admin."""
    start_token: SecretStr | None = None
    """What lets a browser in while there are no accounts. Unset, `up` and `demo` make one and keep it in the data folder, only
    for its owner to read, and `serve` asks for none; `off` lets every user of this machine in."""
    login_days: Annotated[float, Field(gt=0, le=3650)] = 30.0
    """Days after which a browser has to log in again."""
    live_per_minute: Annotated[int, Field(ge=1)] = 60
    """Live questions that each person may ask in a minute, where there are accounts."""

    oidc_issuer: str | None = None
    """Address of a service that logs people in (OpenID Connect); unset, only passwords do. Needs accounts."""
    oidc_client_id: str = ""
    """What we are called there."""
    oidc_client_secret_file: Path | None = None
    """File with our secret there, where it gave one."""
    oidc_new: Literal["none", "reader", "editor"] = "none"
    """Role of somebody who has no account yet; `none` lets in only those for whom an admin made one."""
    oidc_role_claim: str | None = None
    """Claim whose values, where they are reader, editor or admin, give the role at every login."""

    webhook: str | None = None
    """Address (http or https) to which a worker POSTs JSON when a job has ended; unset calls nobody."""

    log_format: Literal["text", "json"] = "text"
    """How processes log: `text` says what is wrong; `json` writes a line for every request and message, for machines to read."""
    metrics_host: str = "127.0.0.1"
    """Address on which a worker answers /healthz and /metrics."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The port of that; 0 for none. The web has them among its pages."""
    metrics_public: bool = False
    """Let everybody read the web's /metrics, without the start token or a login."""
    telemetry: bool = False
    """Send traces of requests by OpenTelemetry, to where its own variables (OTEL_EXPORTER_OTLP_ENDPOINT) say."""

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.silent_seconds < 4 * self.beat_seconds:
            raise UsageError(
                f"A worker that beats every {self.beat_seconds:g} s cannot be thought dead after {self.silent_seconds:g} s; "
                "let HEADSCOPE_SILENT_SECONDS be at least four times HEADSCOPE_BEAT_SECONDS.",
                field="silent_seconds",
            )
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.accounts:
            raise UsageError(
                f"Without accounts Headscope will not listen on {self.host}: set HEADSCOPE_ACCOUNTS=true and "
                "HEADSCOPE_ADMIN_PASSWORD_FILE, or use 127.0.0.1 and a tunnel.",
                field="host",
            )
        if self.oidc_issuer is not None:
            self._check_oidc(self.oidc_issuer)
        called = urlsplit(self.webhook or "http://nowhere")
        if called.scheme not in ("http", "https") or not called.hostname:
            raise UsageError("The webhook must be an address that begins with http:// or https://.", field="webhook")
        public = urlsplit(self.public_url or "http://nowhere")
        if public.scheme not in ("http", "https") or not public.hostname or public.query or public.fragment:
            raise UsageError(
                "The public address must begin with http:// or https:// and hold no more than a host, a port and a path.",
                field="public_url",
            )
        return self

    def _check_oidc(self, issuer: str) -> None:
        parts = urlsplit(issuer)
        safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in OWN_NAMES)
        if not safe or not parts.hostname or parts.query or parts.fragment:
            raise UsageError("HEADSCOPE_OIDC_ISSUER must be an address that begins with https://.", field="oidc_issuer")
        if not self.accounts or not self.oidc_client_id:
            raise UsageError(
                "HEADSCOPE_OIDC_ISSUER needs HEADSCOPE_ACCOUNTS=true and HEADSCOPE_OIDC_CLIENT_ID.", field="oidc_issuer"
            )

    @property
    def oidc_secret(self) -> str | None:
        """Our secret at the login service."""
        path = self.oidc_client_secret_file
        return None if path is None else read_secret(path, "oidc_client_secret_file")

    @property
    def url(self) -> sa.URL:
        """Address of the database."""
        url = sa.make_url(self.database_url or f"sqlite:///{self.data / 'headscope.db'}")
        if self.database_password_file is None:
            return url
        return url.set(password=read_secret(self.database_password_file, "database_password_file"))

    @property
    def address(self) -> str:
        """Where people find the pages, without a slash at the end."""
        return (self.public_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def entrance(self) -> str:
        """The address that lets a browser in: with the start token, where one is asked for."""
        return f"{self.address}/start?token={self.token}" if self.token else self.address

    @property
    def prefix(self) -> str:
        """What the public address puts before every path; often nothing."""
        return urlsplit(self.public_url or "").path.rstrip("/")

    @property
    def trusted_hosts(self) -> list[str]:
        """Names that the web answers to; refusing any other stops DNS rebinding."""
        public = urlsplit(self.public_url or "").hostname
        others = [name.strip() for name in self.hosts.split(",") if name.strip()]
        return [*OWN_NAMES, *([public] if public else []), *others]

    @property
    def jobs_url(self) -> str:
        """Address of DBOS's own tables: beside the data on PostgreSQL, in a file of their own on SQLite."""
        if self.url.get_backend_name() == "sqlite":
            return f"sqlite:///{self.data / 'jobs.db'}"
        return self.url.render_as_string(hide_password=False)

    @property
    def engine_url(self) -> str:
        """Where the web finds the engine."""
        return f"http://{self.engine_host}:{self.engine_port or self.port + 1}"

    @cached_property
    def secret(self) -> str:
        """The secret that web and engine share."""
        if self.engine_secret:
            return self.engine_secret.get_secret_value()
        if self.engine_secret_file:
            return read_secret(self.engine_secret_file, "engine_secret_file")
        return _kept_secret(self.data / "engine.secret")

    def guarded(self) -> Self:
        """The same, with the token that lets a browser in where there are no accounts."""
        if self.accounts or self.start_token is not None:
            return self
        return self.model_copy(update={"start_token": SecretStr(_kept_secret(self.data / "start.token"))})

    @property
    def token(self) -> str | None:
        """What lets a browser in; None where nothing is asked."""
        token = None if self.accounts or self.start_token is None else self.start_token.get_secret_value()
        return None if token == "off" else token  # noqa: S105 - a word, not a secret

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


def _kept_secret(path: Path) -> str:
    """The secret in a file that only its owner reads; made when it is first asked for."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return path.read_text()
    with os.fdopen(handle, "w") as file:
        file.write(os.urandom(32).hex())
    return path.read_text()
