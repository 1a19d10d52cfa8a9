"""Commands in processes of their own, forked from one that has loaded everything once: each begins at once, where Python anew
takes six seconds to load torch, transformers and TransformerLens.

What that cannot show: that a command loads what it needs itself, since much is loaded already, with the environment of whoever
loaded it; and how Python begins and ends. Fresh processes show it (`fresh`, or subprocess): a training with its harvest, `up`
and what must stay light in tests/test_cli.py, web, worker and engine in tests/test_leaving.py, the wheel in tests/test_wheel.py.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory
from uuid import uuid4

from server.settings import Settings

# Loaded by whom the others are forked from. `server.cli` is not among them: it looks at its environment when it is loaded.
LOADED = ["server.app", "server.doctor", "server.worker", "server.engine", "server.demo"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(LOADED)


def _command(arguments: tuple[str, ...], env: dict[str, str], cwd: str, stdout: str, stderr: str) -> None:
    """What `python -m server.cli` would do in a fresh process."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for place, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["headscope", *arguments]
    try:
        runpy.run_module("server.cli", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a forked process leaves without


def work(settings: Settings, said: Path) -> None:
    """A worker, in a process that `CONTEXT` has forked; what it says goes to the end of a file."""
    with said.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from server.db import Database
    from server.worker import run_worker

    torch.set_num_threads(1)  # so that every run rounds alike
    run_worker(settings, Database(settings.url))


class Command:
    """`headscope` with arguments, running; what it says goes into files, by default one of its own that is shown where its test
    fails. In all else like subprocess.Popen."""

    def __init__(
        self, *arguments: object, env: Mapping[str, str] | None = None, stdout: Path | None = None, stderr: Path | None = None
    ) -> None:
        own = _folder() / uuid4().hex
        self.places = (stdout or own, stderr or stdout or own)
        """Where stdout and stderr go."""
        self.arguments, self.test = tuple(map(str, arguments)), _test()
        given = (self.arguments, dict(os.environ if env is None else env), str(Path.cwd()), *map(str, self.places))
        self._process = CONTEXT.Process(target=_command, args=given)
        self._process.start()
        _begun.append(self)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has one; TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(str(self._process), timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it is gone."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Said = CompletedProcess[str]
"""What a command answered."""


def ran(*arguments: object, env: Mapping[str, str] | None = None, timeout: float = 240) -> Said:
    """A command, to its end."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        command = Command(*arguments, env=env, stdout=out, stderr=err)
        try:
            command.wait(timeout)
        finally:
            command.kill()
        return Said(list(arguments), command.wait(30), out.read_text(), err.read_text())


def fresh(*arguments: object, env: Mapping[str, str] | None = None, timeout: float = 240) -> Said:
    """A command, to its end, in a process that has loaded nothing."""
    command = [sys.executable, "-m", "server.cli", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


_begun: list[Command] = []


def told() -> Iterator[tuple[str, str]]:
    """What the test's commands have said so far, and others that still run: a heading and the end of it, of each."""
    for command in _begun:
        if command.test == _test() or command.poll() is None:
            for place in dict.fromkeys(command.places):
                if place.exists() and (text := place.read_text(errors="replace")[-LAST:]):
                    yield f"said by headscope {' '.join(command.arguments)} ({command.poll()})", text


LAST = 5000
"""Characters of what a command said that are shown."""


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]  # less its phase


@cache
def _folder() -> Path:
    folder = TemporaryDirectory(prefix="headscope-said-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@atexit.register
def _end() -> None:
    """multiprocessing would wait for whoever is left."""
    for command in _begun:
        command.kill()
