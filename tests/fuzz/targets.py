"""What reads others' bytes, and what may come of it: what it is, or one of our sentences. Anything else is a finding.

Each target takes a file apart that is good but for one damage: bytes changed, cut or put in, or, of JSON, a value at a random
place replaced by an odd one, which comes further than noise does.
"""

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from sae_core.config import CorpusSource, SweepConfig, TrainConfig
from sae_core.corpus import documents
from sae_core.errors import HeadscopeError
from sae_core.formats import open_peer
from sae_core.probes import read_texts
from server.exchange import dashboards
from server.fields import split_texts
from server.forms import filled
from server.store import search

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**200, 0.5, -1e308, float("nan"), float("inf"), "", "\0", "\ud800", "x" * 1000, "../..",
    [], [[]], [None], [-1], [1e308], {}, {"": {}}, [[1], [2, 3]],
)  # fmt: skip


class Source:
    """Choices, made by whoever drives: hypothesis, or atheris."""

    def __init__(self, below: Callable[[int], int], some: Callable[[int], bytes]) -> None:
        self.below, self.some = below, some


def damaged(data: bytes, by: Source) -> bytes:
    """The same but for one damage."""
    lines = data.split(b"\n")
    if len(lines) > 1 and data[:1] == b"{":
        at = by.below(len(lines))
        return b"\n".join([*lines[:at], damaged(lines[at], by), *lines[at + 1 :]])
    if data[:1] in (b"{", b"[") and by.below(4):
        return _odd(data, by)
    at = by.below(len(data) + 1)
    how = by.below(4)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + by.some(16) + data[at:]
    length = 1 + by.below(8 if how == 2 else 400)
    return data[:at] + (by.some(length) if how == 2 else b"") + data[at + length :]


def _odd(data: bytes, by: Source) -> bytes:
    whole = json.loads(data)
    holder, key, here = [whole], 0, whole
    for _ in range(by.below(9)):
        if not isinstance(here, dict | list) or not here:
            break
        key = list(here)[by.below(len(here))] if isinstance(here, dict) else by.below(len(here))
        holder, here = here, here[key]
    if by.below(5):
        holder[key] = ODD[by.below(len(ODD))]
    elif holder is not whole or len(whole):
        del holder[key]
    top = holder[0] if holder and holder is not whole and isinstance(holder, list) and len(holder) == 1 else whole
    return json.dumps(top if here is whole else whole).encode("utf-8", "surrogatepass")


def saedashboard(by: Source) -> None:
    """SAEDashboard's files."""
    names = ("batch-0.json", "batch-1.json", "skipped_indexes.json")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(FIXTURES / "dashboards", Path(place) / "x"))
        path = folder / names[by.below(3)]
        path.write_bytes(damaged(path.read_bytes(), by))
        _read_dashboards(folder)


def neuronpedia(by: Source) -> None:
    """Neuronpedia's bulk files: a damage in a line, or in the compressed bytes."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind, lines in _LINES.items():
            (folder / kind).mkdir()
            (folder / kind / "batch-0.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines), 1))
        kind = list(_LINES)[by.below(3)]
        path = folder / kind / "batch-0.jsonl.gz"
        if by.below(5):
            lines = list(_LINES[kind])
            at = by.below(len(lines))
            lines[at] = damaged(lines[at], by)
            path.write_bytes(gzip.compress(b"\n".join(lines), 1))
        else:
            path.write_bytes(damaged(path.read_bytes(), by))
        _read_dashboards(folder)


def _bulk() -> dict[str, list[bytes]]:
    features, shown, said = [], [], []
    batch = json.loads((FIXTURES / "dashboards" / "batch-0.json").read_text())
    for feature in batch["features"][:4]:
        key = {"modelId": "tiny", "layer": "1-att-tiny", "index": str(feature["feature_index"])}
        rest = {name: value for name, value in feature.items() if name not in ("activations", "feature_index", "vector")}
        features.append(key | rest)
        for one in feature["activations"][:5]:
            names = {"binMin": "bin_min", "binMax": "bin_max", "binContains": "bin_contains"}
            names |= {"dfaValues": "dfa_values", "dfaTargetIndex": "dfa_targetIndex"}
            shown.append(key | {to: one[of] for to, of in names.items()} | {n: one[n] for n in ("tokens", "values")})
        said.append(key | {"description": "fires on words", "typeName": "oai", "explanationModelName": "gpt-5"})
    every = {"features": features, "activations": shown, "explanations": said}
    return {kind: [json.dumps(line).encode() for line in lines] for kind, lines in every.items()}


def _read_dashboards(folder: Path) -> None:
    about = dashboards.About(np.full((64, 4), 0.25), [[] for _ in range(64)])
    layout = dashboards.look(folder)
    covered: set[int] = set()
    for number in layout.parts:
        covered.update(feature.record.idx for feature in dashboards.read(layout, number, about))
    dashboards.missing_features(covered, layout, 40)


def saes(by: Source) -> None:
    """Peers' SAEs, of every format that is read."""
    cases = sorted((FIXTURES / "formats").iterdir())
    case = cases[by.below(len(cases))]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(case, Path(place) / case.name, ignore=shutil.ignore_patterns("expected.*")))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = files[by.below(len(files))]
        path.write_bytes(damaged(path.read_bytes(), by))
        inside = [one for one in folder.iterdir() if one.is_dir()]
        open_peer(inside[0] if case.name == "sparsify" and inside else folder)


def corpora(by: Source) -> None:
    """Text: files of every kind that a corpus, or labelled texts, may be of."""
    lines = [json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) for i in range(24)]
    kinds = {"x.jsonl": "\n".join(lines), "x.txt": "one\n\ntwo\n\nthree", "x.json": json.dumps([{"text": "t"}] * 3)}
    name = list(kinds)[by.below(len(kinds))]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        path.write_bytes(damaged(kinds[name].encode(), by))
        for _ in documents(CorpusSource(location=str(path))):
            pass
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x.jsonl"
        path.write_bytes(damaged(kinds["x.jsonl"].encode(), by))
        read_texts(path)


def typed(by: Source) -> None:
    """What people type: lists of texts, words to search for, forms."""
    text = by.some(40).decode("utf-8", "replace")
    search.words(text)
    search.word(text)
    split_texts(text)
    fields = (
        "model",
        "corpus",
        "site.layer",
        "rows.tokens",
        "harvests",
        "harvests.0.tokens",
        "k",
        "lr",
        "ks",
        "layers",
        "base.k",
    )
    sent = {fields[by.below(len(fields))]: by.some(12).decode("utf-8", "replace") for _ in range(3)}
    filled(TrainConfig, sent)
    filled(SweepConfig, sent)
    with suppress(ValidationError):
        TrainConfig.model_validate_json(by.some(60))


_LINES = _bulk()
TARGETS: dict[str, Callable[[Source], None]] = {
    target.__name__: target for target in (saedashboard, neuronpedia, saes, corpora, typed)
}


def attempt(name: str, by: Source) -> bool:
    """Whether the target took it; False where it was refused with a sentence."""
    try:
        TARGETS[name](by)
    except HeadscopeError as error:
        if not str(error).strip().endswith((".", "?", "!")):
            raise AssertionError(f"This is no sentence: {error}") from error
        return False
    return True
