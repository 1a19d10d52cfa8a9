"""Runs one timed piece of work in a process of its own, so that its memory and its warm-up are nobody else's."""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
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


def forget_peak() -> int:
    """Bytes of memory that this process holds now; on Linux `peak_memory` begins anew from here."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to what is held now
    return peak_memory()
