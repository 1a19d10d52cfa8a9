"""Web, worker and engine as three children of one process, on 127.0.0.1 with SQLite and no configuration. No torch.

Ctrl-C stops them in order: SIGINT, time for the batch in hand, SIGTERM, and only then SIGKILL. A child holds the read end of
a pipe whose write end is ours alone, so it leaves by itself when we die in whatever way. Children have a session of their
own, so that Ctrl-C in the terminal reaches them through us.
"""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from sae_core.errors import MachineError, PortTaken
from server import jobs
from server.db import Database
from server.settings import Settings

PARENT_PIPE = "HEADSCOPE_PARENT_PIPE"
PATIENCE = 30.0  # seconds for the batch in hand
RESTARTS = 5
Say = Callable[[str], None]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `PortTaken` when another program has the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(2048)
    except OverflowError as error:
        found.close()
        raise PortTaken(f"There is no port {port}; choose one from 1 to 65535.", field="port") from error
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"Port {port} on {host} is taken by another program, perhaps another Headscope; "
                "stop it, or choose another port with --port or HEADSCOPE_PORT.",
                field="port",
            ) from error
        raise PortTaken(
            f"Port {port} on {host} cannot be opened ({error.strerror}); choose another one.", field="port"
        ) from error
    return found


def die_with_parent() -> None:
    """In a child: leave, as if asked to, when the process that started us is gone."""
    handle = os.environ.pop(PARENT_PIPE, None)
    if handle is None:
        return

    def wait() -> None:
        os.read(int(handle), 1)  # returns when the last write end is closed, which is when the parent has died
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


@dataclass
class Child:
    """One of the three processes."""

    name: str
    settings: Settings
    pipe: int
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    again_at: float = 0.0

    @property
    def console(self) -> Path:
        """Where its output goes."""
        return self.settings.data / "logs" / f"{self.name}.console.log"

    def start(self) -> None:
        """Start it; its output goes to a file, its settings come from ours."""
        self.console.parent.mkdir(parents=True, exist_ok=True)
        with self.console.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603 - our own program
                # -P: a file called server.py in the present folder must not be taken for our package
                [sys.executable, "-P", "-m", "server.cli", self.name],
                env=os.environ | environment(self.settings) | {PARENT_PIPE: str(self.pipe)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(self.pipe,),
                start_new_session=True,
            )
        self.starts += 1

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self.process is not None and self.process.poll() is None

    def last_words(self) -> str:
        """The last line it wrote."""
        lines = self.console.read_text(errors="replace").strip().splitlines() if self.console.exists() else []
        return lines[-1] if lines else "it said nothing"


def environment(settings: Settings) -> dict[str, str]:
    """What a child must be told to have the same settings."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set | {"data", "cache", "host", "port"}}
    plain = {name: value.get_secret_value() if hasattr(value, "get_secret_value") else value for name, value in given.items()}
    return {f"HEADSCOPE_{name.upper()}": str(value) for name, value in plain.items() if value is not None}


@dataclass
class Supervisor:
    """Keeps the three running until told to stop."""

    settings: Settings
    say: Say
    stopping: threading.Event = field(default_factory=threading.Event)
    children: list[Child] = field(default_factory=list)

    def __enter__(self) -> "Supervisor":
        """Check the ports, upgrade both databases, start all three, wait until the page answers."""
        for port in (self.settings.port, self.settings.engine_port or self.settings.port + 1):
            listen(self.settings.host if port == self.settings.port else self.settings.engine_host, port).close()
        db = Database(self.settings.url)
        jobs.upgrade(self.settings, db)
        db.close()
        _ = self.settings.secret  # made once, before two children would make it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self.stopping.set())
        read_end, self._write_end = os.pipe()
        self.children = [Child(name, self.settings, read_end) for name in ("serve", "worker", "engine")]
        for child in self.children:
            child.start()
        try:
            self._wait_for_page()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Where the pages are."""
        return f"http://{self.settings.host}:{self.settings.port}"

    def look(self) -> None:
        """Start again what has died, a few times; without the web there is no point in going on."""
        for child in self.children:
            if child.running or self.stopping.is_set():
                continue
            if child.again_at == 0.0:
                self.say(f"The {child.name} process has stopped ({child.last_words()}); see {child.console}.")
                if child.starts > RESTARTS:
                    raise MachineError(
                        f"The {child.name} process stopped {child.starts} times; its last words are in {child.console}."
                    )
                child.again_at = time.monotonic() + 2.0 ** (child.starts - 1)
            elif time.monotonic() >= child.again_at:
                child.again_at = 0.0
                child.start()

    def stay(self) -> None:
        """Until somebody stops us."""
        while not self.stopping.wait(0.5):
            self.look()

    def stop(self) -> None:
        """Ask all three to leave, and see that they do."""
        self.stopping.set()
        for number, seconds in ((signal.SIGINT, PATIENCE), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            alive = [child.process for child in self.children if child.process and child.process.poll() is None]
            for process in alive:
                process.send_signal(number)
            deadline = time.monotonic() + seconds
            while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _wait_for_page(self) -> None:
        web = self.children[0]
        for _ in range(600):
            if self.stopping.is_set():
                return
            if not web.running:
                raise MachineError(f"The web process did not start: {web.last_words()}")
            try:
                if httpx.get(f"{self.address}/healthz", timeout=2.0, trust_env=False).status_code < 500:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise MachineError(f"The web process does not answer at {self.address}; see {web.console}.")


def run(settings: Settings, say: Say, then: Callable[[Supervisor], None] | None = None) -> None:
    """Start all three, print the address, do `then`, and stay until stopped."""
    settings = settings.guarded()
    with Supervisor(settings, say) as supervisor:
        if not supervisor.stopping.is_set():
            say(f"Headscope is at {settings.entrance} (Ctrl-C stops it; nothing is lost).")
            if then:
                then(supervisor)
            supervisor.stay()
        say("Stopping: the worker finishes the batch in hand.")
