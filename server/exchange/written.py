"""Writing a harvest for others: SAEDashboard's batches, Neuronpedia's bulk files, Delphi's latent cache. Feature by
feature, so that memory does not grow with the harvest.

What they have no place for is left out: DFA by head (its sum over heads is there, from the entries that are kept), head means,
families, positions, partners. Numbers are written to 7 digits, so that what is read again is what was stored.
"""

import gzip
import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from server.store.exports import ExportedExample, ExportedFeature
from server.store.saes import SaeRef

SAEDASHBOARD_BATCH, NEURONPEDIA_BATCH, DELPHI_BATCH = 128, 1024, 1024
COMPRESSION = 1
"""A third quicker than 3, and a tenth larger."""
TOP = -1.0
"""What both write for the bounds and the share of the strongest examples, which are of no band."""
CREATOR = "headscope"


class Wrote(NamedTuple):
    """How much was written."""

    features: int
    examples: int
    size: int
    """Bytes, before compression."""


def _round(value: float) -> float:
    return float(f"{value:.7g}")


def _digits(values: NDArray[np.float64]) -> list[float]:
    """Numbers in so many decimal places that the largest has 7 digits: there are hundreds to an example."""
    most = float(np.abs(values).max(initial=0.0))
    found: list[float] = values.round(6 - math.floor(math.log10(most)) if most > 0 else 0).tolist()
    return found


def _batches(features: Iterable[ExportedFeature], size: int) -> Iterator[list[ExportedFeature] | Iterator[ExportedFeature]]:
    """Runs of `size` features; each is read as it is asked for."""
    walk = iter(features)
    for first in walk:
        yield _with(first, islice(walk, size - 1))


def _with(first: ExportedFeature, rest: Iterator[ExportedFeature]) -> Iterator[ExportedFeature]:
    yield first
    yield from rest


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A file that has its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.aside")
    yield aside
    aside.rename(path)


# ---- what both kinds of dashboards have ----


def _shared(feature: ExportedFeature) -> dict[str, Any]:
    """Fields that SAEDashboard and Neuronpedia call the same."""
    edges, counts = feature.logits
    return {
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "neg_str": [text for _, text, _ in feature.suppressed],
        "neg_values": [_round(value) for _, _, value in feature.suppressed],
        "pos_str": [text for _, text, _ in feature.promoted],
        "pos_values": [_round(value) for _, _, value in feature.promoted],
        "frac_nonzero": feature.density,
        "freq_hist_data_bar_values": list(map(_round, feature.middles())),
        "freq_hist_data_bar_heights": list(feature.histogram[1]),
        "logits_hist_data_bar_values": [_round((a + b) / 2) for a, b in pairwise(edges)],
        "logits_hist_data_bar_heights": list(counts),
        "decoder_weights_dist": list(map(_round, feature.head_norm)),
    }


class _Row(NamedTuple):
    """An example in their form; positions count from the first token shown."""

    low: float
    high: float
    share: float
    tokens: Sequence[str]
    values: list[float]
    dest: int
    dfa: list[float] | None


def _row(example: ExportedExample, feature: ExportedFeature) -> _Row:
    start, n = example.start, len(example.texts)
    dense = np.zeros(n)
    shown = (example.pos >= start) & (example.pos < start + n)
    dense[example.pos[shown] - start] = example.act[shown]
    values, dfa = _digits(dense), None if example.by_source is None else _digits(example.by_source)
    if example.band == 0:
        return _Row(TOP, _round(feature.max_act), TOP, example.texts, values, example.dest - start, dfa)
    band = feature.bands[example.band - 1] if example.band <= len(feature.bands) else {"low": 0.0, "high": 0.0, "count": 0}
    share = band["count"] / feature.n_fired if feature.n_fired else 0.0
    return _Row(_round(band["low"]), _round(band["high"]), share, example.texts, values, example.dest - start, dfa)


# ---- SAEDashboard ----


def saedashboard(features: Iterable[ExportedFeature], sae: SaeRef, folder: Path) -> Wrote:
    """`batch-N.json` of 128 features each, and `skipped_indexes.json` with the dead ones."""
    assert sae.harvest is not None
    n, n_examples, size = 0, 0, 0
    dead: list[int] = []
    head = {"model_id": sae.model, "layer": sae.layer, "sae_set": f"att-{sae.name}", "sae_id_suffix": None}
    context = sae.harvest.context
    about = {"n_prompts_total": sae.harvest.n_tokens // context if context else 0, "n_tokens_in_prompt": context}

    def live() -> Iterator[ExportedFeature]:
        for feature in features:
            if feature.n_fired:
                yield feature
            else:
                dead.append(feature.index)

    for number, batch in enumerate(_batches(live(), SAEDASHBOARD_BATCH)):
        with _aside(folder / f"batch-{number}.json") as aside, aside.open("wb") as file:
            size += file.write(to_json(head)[:-1] + b',"features":[')
            for at, feature in enumerate(batch):
                text = to_json(_of_saedashboard(feature, about | {"dataset": sae.harvest.corpus}))
                size += file.write(b"," + text if at else text)
                n, n_examples = n + 1, n_examples + len(feature.examples)
            size += file.write(b"]}")
    skipped = {key: head[key] for key in ("model_id", "layer", "sae_set")} | {"log_sparsity": 0, "skipped_indexes": dead}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "skipped_indexes.json").write_text(json.dumps(skipped))
    return Wrote(n, n_examples, size)


def _of_saedashboard(feature: ExportedFeature, about: dict[str, Any]) -> dict[str, Any]:
    activations = []
    for example in feature.examples:
        row = _row(example, feature)
        one: dict[str, Any] = {
            "bin_min": row.low, "bin_max": row.high, "bin_contains": row.share, "tokens": row.tokens, "values": row.values,
            "qualifying_token_index": row.dest,
        }  # fmt: skip
        if row.dfa is not None:
            one |= {"dfa_values": row.dfa, "dfa_maxValue": max(row.dfa, default=0.0), "dfa_targetIndex": row.dest}
        activations.append(one)
    correlated: dict[str, list[int]] = {f"correlated_features_{name}": [] for name in ("indices", "l1", "pearson")}
    return {"feature_index": feature.index} | _shared(feature) | correlated | about | {"activations": activations, "vector": []}


# ---- Neuronpedia ----


def neuronpedia(features: Iterable[ExportedFeature], sae: SaeRef, folder: Path) -> Wrote:
    """`v1/<model>/<source>/` with `features`, `activations` and `explanations` of 1,024 features a batch, and the lines that say
    what the source is: its pages are to show DFA and head bars."""
    assert sae.harvest is not None
    source_id = f"{sae.layer}-att-{sae.name}"
    place = folder / "v1" / sae.model / source_id
    context = sae.harvest.context
    key = {"modelId": sae.model, "layer": source_id}
    made = {"creatorId": CREATOR, "creatorName": CREATOR}
    _write_lines(
        place / "release.jsonl", {"name": sae.name, "description": sae.name, "visibility": "UNLISTED", "urls": []} | made
    )
    about: dict[str, Any] = {"id": sae.model, "displayName": sae.model, "displayNameShort": sae.model, "layers": sae.layer + 1}
    _write_lines(
        place / "model.jsonl", about | {"neuronsPerLayer": 0, "owner": "", "visibility": "UNLISTED", "creatorId": CREATOR}
    )
    shows = {"showDfa": True, "showHeadAttribution": True, "showCorrelated": False, "showUmap": False}
    sourceset: dict[str, Any] = {
        "modelId": sae.model,
        "name": f"att-{sae.name}",
        "description": f"Features of {sae.name} on {sae.hook}",
    }
    sourceset |= {"type": "attention", "urls": [], "visibility": "UNLISTED", "releaseName": sae.name, "hasDashboards": True}
    _write_lines(place / "sourceset.jsonl", sourceset | shows | made)
    source = {
        "id": source_id,
        "modelId": sae.model,
        "setName": f"att-{sae.name}",
        "hasDashboards": True,
        "visibility": "UNLISTED",
    }
    swept = {"num_prompts": sae.harvest.n_tokens // context if context else 0, "num_tokens_in_prompt": context}
    _write_lines(place / "source.jsonl", source | swept | {"dataset": sae.harvest.corpus, "creatorId": CREATOR})

    n, n_examples, size = 0, 0, 0
    methods: set[str] = set()
    authors: set[str] = set()
    for number, batch in enumerate(_batches(features, NEURONPEDIA_BATCH)):
        name = f"batch-{number}.jsonl.gz"
        with (
            _zipped(place / "features" / name) as of_features,
            _zipped(place / "activations" / name) as of_activations,
            _zipped(place / "explanations" / name) as of_labels,
        ):
            for feature in batch:
                mine = key | {"index": str(feature.index)}
                own: dict[str, Any] = {"sourceSetName": f"att-{sae.name}", "creatorId": CREATOR, "maxActApprox": feature.max_act}
                own |= {"hookName": sae.hook, "hasVector": False, "vector": [], "topkCosSimIndices": [], "topkCosSimValues": []}
                size += _line(of_features, mine | own | _shared(feature))
                for at, example in enumerate(feature.examples):
                    size += _line(of_activations, _of_neuronpedia(mine, at, example, feature, sae.harvest.corpus))
                for at, label in enumerate(feature.labels):
                    methods.add(label.method)
                    authors.add(label.author)
                    said = {"id": _id(mine, f"label-{at}"), "description": label.text, "authorId": CREATOR}
                    size += _line(of_labels, mine | said | {"typeName": label.method, "explanationModelName": label.author})
                n, n_examples = n + 1, n_examples + len(feature.examples)
    kinds = [{"name": name, "displayName": name, "description": "", "isAttention": True} | made for name in sorted(methods)]
    _write_lines(folder / "v1" / "config" / "explanation_type.jsonl", *kinds)
    models = [{"name": name, "displayName": name, "description": "", "displayNameShort": name} | made for name in sorted(authors)]
    _write_lines(folder / "v1" / "config" / "explanation_model_type.jsonl", *models)
    return Wrote(n, n_examples, size)


def _of_neuronpedia(
    key: dict[str, str], at: int, example: ExportedExample, feature: ExportedFeature, dataset: str
) -> dict[str, Any]:
    row = _row(example, feature)
    most = max(row.values, default=0.0)
    found: dict[str, Any] = key | {
        "id": _id(key, str(at)), "creatorId": CREATOR, "dataSource": dataset, "tokens": row.tokens, "values": row.values,
        "maxValue": most, "minValue": min(row.values, default=0.0),
        "maxValueTokenIndex": row.values.index(most) if row.values else 0,
        "binMin": row.low, "binMax": row.high, "binContains": row.share, "qualifyingTokenIndex": row.dest,
    }  # fmt: skip
    if row.dfa is not None:
        found |= {"dfaValues": row.dfa, "dfaTargetIndex": row.dest, "dfaMaxValue": max(row.dfa, default=0.0)}
    return found


def _id(key: dict[str, str], tail: str) -> str:
    return f"{key['modelId']}-{key['layer']}-{key['index']}-{tail}"


@contextmanager
def _zipped(path: Path) -> Iterator[gzip.GzipFile]:
    with _aside(path) as aside, gzip.open(aside, "wb", COMPRESSION) as file:
        yield file


def _line(file: gzip.GzipFile, value: dict[str, Any]) -> int:
    return file.write(to_json(value) + b"\n")


def _write_lines(path: Path, *values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))


# ---- Delphi ----


def delphi(
    features: Iterable[ExportedFeature],
    sae: SaeRef,
    folder: Path,
    rows: tuple[dict[int, int], NDArray[np.int32]],
    model_name: str,
) -> Wrote:
    """A latent cache of the kept examples: `<hook>/<first>_<last>.safetensors` with locations [n, 3] (row, position, feature from
    the first), activations [n] and tokens [rows, context], and a `config.json`.

    It has the kept examples and no other firings: strongest ones and fair samples of each band, so what counts firings
    there counts those. `rows` are the places of the rows by their numbers, and their token ids (`exports.token_rows`).
    """
    assert sae.harvest is not None
    places, tokens = rows
    place = folder / sae.hook
    place.mkdir(parents=True, exist_ok=True)
    n, n_examples, size = 0, 0, 0
    for batch in _batches(features, DELPHI_BATCH):
        found: list[tuple[int, int, int, float]] = []
        first, last = -1, -1
        for feature in batch:
            first, last = feature.index if first < 0 else first, feature.index
            once = {
                (places[e.row], at): act for e in feature.examples for at, act in zip(e.pos.tolist(), e.act.tolist(), strict=True)
            }
            found += [(row, at, feature.index, act) for (row, at), act in sorted(once.items())]
            n, n_examples = n + 1, n_examples + len(feature.examples)
        place_of = np.array([one[:3] for one in found], np.int64).reshape(-1, 3) - [0, 0, first]
        small = not len(place_of) or int(place_of.max()) < 2**16
        tensors: dict[str, NDArray[Any]] = {
            "locations": place_of.astype(np.uint16 if small else np.uint32),
            "activations": np.array([one[3] for one in found], np.float16),
            "tokens": tokens,
        }
        with _aside(place / f"{first}_{last}.safetensors") as aside:
            size += write_safetensors(tensors, aside)
    about = {
        "dataset_repo": sae.harvest.corpus, "dataset_split": "train", "dataset_name": "", "dataset_column": "text",
        "batch_size": 32, "cache_ctx_len": int(tokens.shape[1]), "ctx_len": int(tokens.shape[1]), "n_tokens": int(tokens.size),
        "n_splits": math.ceil(sae.d_sae / DELPHI_BATCH), "model_name": model_name,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(about, indent=4))
    return Wrote(n, n_examples, size)


DTYPES = {"uint16": "U16", "uint32": "U32", "float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64"}


def write_safetensors(tensors: dict[str, NDArray[Any]], path: Path) -> int:
    """Arrays as a safetensors file: the length of the header in 8 bytes, the header as JSON, then the data. How many bytes.

    Its own package comes with torch's part of this, and this needs none.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors.items():
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return 8 + len(text) + end
