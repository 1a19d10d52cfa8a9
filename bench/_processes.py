"""Runs one timed piece of work in a process of its own, so that its memory and its warm-up are nobody else's."""

import json
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LAST_LINES = 30


def measured(command: Sequence[str | Path], **given: Any) -> dict[str, Any]:
    """What `command` says as JSON on its last line, given a JSON object as its last argument; SystemExit where it fails."""
    done = subprocess.run([*map(str, command), json.dumps(given)], capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()[-LAST_LINES:]
        sys.exit("\n".join([f"{' '.join(map(str, command))} failed:", *lines]))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_memory() -> int:
    """Bytes of memory that this process has held at most: its own since it began (VmHWM), not what it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def peak_of(pid: int) -> Iterator[list[int]]:
    """Bytes that a process holds of its own at most (RssAnon), meanwhile: looked at every 10 ms, on Linux."""
    found, over = [0], threading.Event()
    status = Path(f"/proc/{pid}/status")

    def look() -> None:
        while not over.wait(0.01):
            held = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
            found[0] = max(found[0], 1024 * int(held[1]) if held else 0)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
