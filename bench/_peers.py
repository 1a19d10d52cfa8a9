"""A virtual environment for each peer, made on first use and reused: peers want versions that ours must not have."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def folder() -> Path:
    """Where the environments are: `$HEADSCOPE_CACHE/bench`, else a folder in the user's cache."""
    cache = os.environ.get("HEADSCOPE_CACHE")
    return Path(cache) / "bench" if cache else Path.home() / ".cache" / "headscope-bench"


def peer_python(name: str, requirements: Sequence[str], alone: Sequence[str] = ()) -> Path:
    """The Python of the peer's environment, made with exactly these requirements (pinned: `eai-sparsify==1.3.3`).

    torch, where it is among them, is installed before the rest, so that the rest cannot pull another build of it in. What
    is named in `alone` comes last and without what it asks for, which `requirements` then have to hold.
    An environment that is half made, or was made of other requirements, is made anew.
    """
    made = [*requirements, *(f"{wanted} alone" for wanted in alone)]
    place = folder() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    python, made_of = place / "bin" / "python", place / "requirements.json"
    with (place.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made_of.exists() and json.loads(made_of.read_text()) == made:
            return python
        print(f"Installing {', '.join(made)} into {place}; once, a few minutes.", file=sys.stderr, flush=True)
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        torch = [wanted for wanted in requirements if wanted.startswith("torch==")]
        # torch is named again beside the others: a pin that pip must keep.
        parts = ([torch] if torch else []) + [list(requirements)] + ([["--no-deps", *alone]] if alone else [])
        for part in parts:
            subprocess.run([python, "-m", "pip", "install", "-qq", *part], check=True, stdout=sys.stderr)
        made_of.write_text(json.dumps(made))
    return python
