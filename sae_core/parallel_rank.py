"""One of the processes that train together, run by torchrun: `python -m sae_core.parallel_rank <socket>`.

It leaves with status 0 whenever that is what is wanted (done, told to stop, an error that was reported), and with another
one when another rank was lost: torchrun then starts all ranks again. See `parallel.py`, to which it is connected.
"""

import ctypes
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sae_core.parallel import SAVE_SECONDS, SEEN_SECONDS, Done, Hello, Leaving, Task
from sae_core.ranks import RankLost, Ranks, Stopped
from sae_core.train import train_many

PATIENCE = timedelta(days=30)  # a rank waits for the others as long as it takes; one that dies is noticed otherwise
PR_SET_PDEATHSIG = 1


class Told:
    """Whether this process was told to stop, by its line or by torchrun; and that it leaves soon after."""

    def __init__(self, line: Connection) -> None:
        self._line, self._told, self._seen = line, threading.Event(), False
        threading.Thread(target=self._hear, name="line", daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: self._begin())

    def __call__(self) -> bool:
        """Asked between two batches."""
        if self._told.is_set() and not self._seen:
            self._seen = True
            self._line.send(Leaving())
        return self._told.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Until it is; False when that took too long."""
        return self._told.wait(seconds)

    def _hear(self) -> None:
        with suppress(EOFError, OSError):
            self._line.recv()
            self._begin()
            self._line.recv()  # nothing more is said: this ends when the line does
        os._exit(0)

    def _begin(self) -> None:
        if not self._told.is_set():
            self._told.set()
            threading.Thread(target=self._leave, name="leave", daemon=True).start()

    def _leave(self) -> None:
        """A computation that does not end, or that waits for a rank that is gone, is left where it is."""
        time.sleep(SEEN_SECONDS)
        if self._seen:
            time.sleep(SAVE_SECONDS)
        os._exit(0)


def main(address: str) -> int:
    """Connect, train, report; the exit status."""
    _die_with_torchrun()
    door = socket.socket(socket.AF_UNIX)
    try:
        door.connect(address)
    except OSError:  # whoever started us is gone
        return 0
    line = Connection(door.detach())
    rank = int(os.environ["RANK"])
    line.send(Hello(rank, os.getpid(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])))
    try:
        task = line.recv()
    except (EOFError, OSError):
        return 0
    if not isinstance(task, Task):
        return 0
    told = Told(line)
    try:
        _train(task, line, told)
        line.send(Done())
    except Stopped:
        return 0
    except RankLost as error:
        sys.stderr.write(f"rank {rank}: {error}\n")
        return 0 if told.wait(SEEN_SECONDS) else 1
    except BaseException as error:
        traceback.print_exc()
        line.send(_portable(error))
    told.wait()  # the others may not be done with us
    return 0


def _train(task: Task, line: Connection, told: Told) -> None:
    """This rank's share of `train_many`."""
    torch.set_num_threads(task.threads)
    device, local = task.device, int(os.environ["LOCAL_RANK"])
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps one store for all attempts: without a name of its own, a rank would look for those that are gone
    store = PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    control = None
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
        distributed.init_process_group(
            "nccl", store=store, rank=rank, world_size=size, timeout=PATIENCE, device_id=torch.device(device)
        )
        control = distributed.new_group(backend="gloo", timeout=PATIENCE)
    else:
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    ranks = Ranks(rank, size, told, control)
    lens = task.load(device=device)
    for report in train_many(task.cfgs, lens, task.rows(), task.folder, task.caches, ranks):
        line.send(report)


def _portable(error: BaseException) -> BaseException:
    """The error as it can travel, with where it came from as a note."""
    try:
        error.add_note("In one of the processes that train together:\n" + "".join(traceback.format_exception(error)))
        error = error.with_traceback(None)
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:
        return RuntimeError("".join(traceback.format_exception_only(error)).strip())
    return error


def _die_with_torchrun() -> None:
    """On Linux the system kills us when torchrun is gone; elsewhere the line does, a little later."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    # Not sys.exit: threads of gloo or NCCL that wait for a rank that is gone would keep us here.
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
