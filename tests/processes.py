"""Commands in processes of their own, forked from one that has loaded everything once: each begins at once, where Python anew
takes six seconds to load torch, transformers and TransformerLens.

All else is as `python -m server.cli` does it; how Python begins and ends is in tests/test_leaving.py and tests/test_wheel.py.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

# Loaded by whom the others are forked from. `server.cli` is not among them: it looks at its environment when it is loaded.
LOADED = ["pytest", "server.app", "server.doctor", "server.worker", "server.engine", "server.demo", "tests.faults.conftest"]
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


class Command:
    """`headscope` with arguments, running; what it says goes into files. In all else like subprocess.Popen."""

    def __init__(
        self, *arguments: object, env: Mapping[str, str] | None = None, stdout: Path | None = None, stderr: Path | None = None
    ) -> None:
        places = [os.devnull if place is None else str(place) for place in (stdout, stderr or stdout)]
        given = (tuple(map(str, arguments)), dict(os.environ if env is None else env), str(Path.cwd()), *places)
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


_begun: list[Command] = []


@atexit.register
def _end() -> None:
    """multiprocessing would wait for whoever is left."""
    for command in _begun:
        command.kill()
