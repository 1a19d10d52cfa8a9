"""Neuronpedia's own client, in an environment of its own: it prints, reads `.env`, and wants versions of its own."""

import json
import subprocess
from pathlib import Path
from typing import Any

from bench._peers import peer_python

CLIENT = ("neuronpedia==1.2.1", "pydantic==2.14.3")  # which a module of it imports, and its package does not ask for
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "_neuronpedia_client.py"


def client_finds(base: str, do: str, folder: Path, of: tuple[str, str, int]) -> Any:
    """What it finds at `base`, run in `folder`: of a model, a source and a feature's index."""
    model, source, index = of
    asked = json.dumps({"base": base, "do": do, "model": model, "source": source, "index": index})
    done = subprocess.run(
        [peer_python("neuronpedia", CLIENT), "-P", SCRIPT, asked], cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
