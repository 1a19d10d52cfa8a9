"""Training in several processes of this machine, followed as if it were one: the side of whoever waits for the SAEs.

    worker or command line           this module, in `train_parallel`
        └── torchrun                 torch.distributed.run: starts the ranks, and starts all again when one is lost
              ├── rank 0             `parallel_rank.py`: `train_many` with `Ranks(0, n)`
              └── rank 1 ...

Each rank connects to a socket of ours. Over that it hears what to do and to stop, and we hear its progress and its errors.
When we die in whatever way the line breaks, and the rank leaves at once, writing nothing: by then the run may belong to
another worker. When a rank dies, the others leave, torchrun starts all of them again, and they go on from the last
checkpoint, a few times.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_core.config import TrainConfig
from sae_core.corpus import Rows
from sae_core.errors import ProcessLost, UsageError
from sae_core.progress import Progress
from sae_core.saes import SAE, load_sae
from sae_core.train import made_by

if TYPE_CHECKING:
    from sae_core.lens import Lens

RESTARTS = 3  # of all ranks, after one was lost
SEEN_SECONDS = 5.0  # in which a rank must have seen that it is told to stop
SAVE_SECONDS = 60.0  # ... and then have saved its place
BEAT_SECONDS = 0.5  # between two reports at the latest, so that whoever follows us can cancel


class Task(NamedTuple):
    """What a rank is to do; it travels pickled, so `load` and `rows` are functions that another process can import."""

    cfgs: Sequence[TrainConfig]
    load: Callable[..., "Lens"]
    """Gives the model: `load(device="cpu")`."""
    rows: Callable[[], Rows]
    folder: Path
    caches: Path | None
    device: str
    """`cpu` or `cuda`: each rank takes the GPU of its number."""
    threads: int
    """Of the CPU, for each rank."""


class Hello(NamedTuple):
    """The first that a rank says."""

    rank: int
    pid: int
    attempt: int
    """How often torchrun has started the ranks again."""


class Leaving(NamedTuple):
    """A rank has seen that it is told to stop, and saves its place."""


class Done(NamedTuple):
    """A rank has nothing more to do."""


class Stop(NamedTuple):
    """The only thing that a rank is told after its task."""


def train_parallel(
    cfgs: Sequence[TrainConfig],
    load: Callable[..., "Lens"],
    rows: Callable[[], Rows],
    folder: Path,
    caches: Path | None = None,
    *,
    processes: int,
    device: str = "cpu",
) -> Generator[Progress, None, list[SAE]]:
    """`train_many` in so many processes: one SAE per process, or one SAE in all of them (see there). Same files, same
    reports, same errors. Closing the generator stops the processes within a few seconds, with a checkpoint; an error
    that is thrown into it kills them.

    `load(device=...)` gives the model and `rows()` the rows, in each process. What the processes print is in
    `folder/ranks.log`. Raises UsageError where there are too few GPUs, ProcessLost where a process is lost again and again.
    """
    check_processes(processes, device)
    kind = torch.device(device).type
    task = Task(cfgs, load, rows, folder, caches, kind, max(torch.get_num_threads() // processes, 1))
    folder.mkdir(parents=True, exist_ok=True)
    group = _Group(task, processes, folder / "ranks.log")
    try:
        yield from group.follow()
        group.stop()
    except GeneratorExit:
        group.stop()
        raise
    finally:
        group.end()
    return [load_sae(made_by(folder, index), device) for index in range(len(cfgs))]


def check_processes(processes: int, device: str) -> None:
    """Raise UsageError where the device cannot be shared by so many processes."""
    kind = torch.device(device).type
    if kind == "cuda" and processes > torch.cuda.device_count():
        raise UsageError(
            f"{processes} processes need a GPU each, and there are {torch.cuda.device_count()} here; ask for no more than that.",
            field="processes",
        )
    if kind not in ("cpu", "cuda") and processes > 1:
        raise UsageError(f"Several processes can share CPUs and CUDA GPUs, not {kind}; ask for one.", field="processes")


class _Line:
    """The connection to one rank."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.rank, self.pid, self.done = connection, -1, 0, False

    def say(self, what: Task | Stop) -> None:
        """Tell the rank; one that is gone hears nothing."""
        with suppress(OSError):
            self.connection.send(what)

    def open(self) -> bool:
        """Whether the rank has not hung up; what it said before is lost."""
        try:
            while self.connection.poll():
                self.connection.recv()
        except (EOFError, OSError):
            return False
        return True


class _Group:
    """torchrun, its ranks, and what they say."""

    def __init__(self, task: Task, processes: int, log: Path) -> None:
        self.task, self.processes, self.log = task, processes, log
        self.apart = len(task.cfgs) >= processes
        self.attempt, self.lost, self.stopping = 0, False, False
        self.lines: list[_Line] = []
        self.shares: dict[int, Progress] = {}  # the last report of each rank that trains SAEs of its own
        self.folder = Path(tempfile.mkdtemp(prefix="headscope-"))  # short: a socket's path has some 100 letters at most
        try:
            self.server = socket.socket(socket.AF_UNIX)
            self.server.bind(str(self.folder / "s"))
            self.server.listen(processes)
            self.torchrun = self._start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
        environment = {
            "OMP_NUM_THREADS": str(self.task.threads),
            "PYTHONPATH": os.pathsep.join(sys.path),  # a rank can import what we can, and nothing from the present folder
            "PYTHONSAFEPATH": "1",
        }
        if self.task.device == "cpu" and loopback:
            environment["GLOO_SOCKET_IFNAME"] = loopback
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(self.processes), "--max-restarts", str(RESTARTS), "--log-dir", str(self.folder)]
        command += ["--monitor-interval", "0.2", "--shutdown-timeout", str(int(SEEN_SECONDS))]
        command += ["-m", "sae_core.parallel_rank", str(self.folder / "s")]
        with self.log.open("ab") as output:
            return subprocess.Popen(  # noqa: S603 - our own program
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in the terminal reaches the ranks through us
            )

    # ---- while they work ----

    def follow(self) -> Generator[Progress, None, None]:
        """Their reports as those of one process, until all are done."""
        last = Progress("start", 0, self.processes, "processes")
        yield last
        while sum(line.done for line in self.lines) < self.processes:
            over = self.torchrun.poll() is not None
            said = self._listen()
            for line, message in said:
                if isinstance(message, RuntimeError) and self.lost:
                    continue  # of a device that waited for a rank which is gone
                if isinstance(message, BaseException):
                    self.stop()
                    raise message
                if isinstance(message, Progress):
                    last = self._of_all(line.rank, message)
                    yield last
                elif isinstance(message, Hello) and message.attempt > self.attempt:
                    self.attempt, self.lost = message.attempt, False
                    self.shares.clear()
                    yield replace(last, values={}, step=None, note=self._sentence("all of them go on from the last checkpoint"))
            if over and not said:
                raise ProcessLost(self._sentence("run the job again, and it goes on from its last checkpoint"))
            if not said:
                yield replace(last, values={}, step=None, note=None)

    def _listen(self) -> list[tuple[_Line, object]]:
        """What the ranks have said since, waiting for it a little."""
        said: list[tuple[_Line, object]] = []
        ready = wait([self.server, *(line.connection for line in self.lines)], timeout=BEAT_SECONDS)
        if self.server in ready:
            self.lines.append(_Line(Connection(self.server.accept()[0].detach())))
        for line in [line for line in self.lines if line.connection in ready]:
            try:
                message = line.connection.recv()
            except (EOFError, OSError):
                self._hung_up(line)
                continue
            if isinstance(message, Hello):
                line.rank, line.pid = message.rank, message.pid
                line.say(Stop() if self.stopping else self.task)
            line.done = line.done or isinstance(message, Done)
            said.append((line, message))
        return said

    def _hung_up(self, line: _Line) -> None:
        """A rank is gone. Were it lost, the others could only wait for it: they are to leave, and torchrun starts anew."""
        self.lines.remove(line)
        line.connection.close()
        self.lost = self.lost or not line.done
        for other in [] if line.done else self.lines:
            other.say(Stop())

    def _of_all(self, rank: int, report: Progress) -> Progress:
        """A rank's report as one of all ranks: where each trains SAEs of its own, it knows only of those."""
        if not self.apart or report.phase != "train":
            return report
        self.shares[rank] = report
        shares = self.shares.values()
        return replace(report, done=sum(share.done for share in shares), rate=sum(share.rate for share in shares))

    def _sentence(self, then: str) -> str:
        return (
            f"One of the {self.processes} processes that train together was lost, killed or out of memory; {then}. "
            f"What they last said is in {self.log}."
        )

    # ---- the end ----

    def stop(self) -> None:
        """Tell all to stop, and give them time to save their place."""
        self.stopping = True
        for line in self.lines:
            line.say(Stop())
        deadline = time.monotonic() + SEEN_SECONDS
        while self.torchrun.poll() is None and time.monotonic() < deadline:
            if any(isinstance(message, Leaving) for _, message in self._listen()):
                deadline = time.monotonic() + SAVE_SECONDS

    def end(self) -> None:
        """Whatever still lives is killed; nothing is left but the log."""
        if self.torchrun.poll() is None:
            self.torchrun.kill()  # the system then kills its ranks (Linux), those that we know we kill ourselves
        self.torchrun.wait()
        for line in self.lines:
            if line.pid and line.open():  # so the number is still its own
                with suppress(ProcessLookupError):
                    os.kill(line.pid, signal.SIGKILL)
            line.connection.close()
        self.server.close()
        shutil.rmtree(self.folder, ignore_errors=True)
