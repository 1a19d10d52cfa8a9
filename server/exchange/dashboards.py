"""Reading dashboards: SAEDashboard's `batch-*.json`, and Neuronpedia's bulk `*.jsonl.gz`.

SAEDashboard fills up its groups with examples on which the feature does not fire, and pairs every example of a prompt with the
DFA of the prompt's strongest token. So an example without a positive activation is left out, and DFA is taken only where its
target is the example's own destination.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from sae_core.errors import UnreadableDashboards
from sae_core.records import FeatureRecord
from server.store.imports import ForeignExample, ForeignFeature, ForeignLabel

BATCH = re.compile(r"^batch-(\d+)\.(?:json|jsonl\.gz)$")
SAEDASHBOARD, NEURONPEDIA = "SAEDashboard", "Neuronpedia"
LACKING = ("DFA by head", "head shares by data", "families", "firings by position", "features that fire together")
WITHOUT_DFA = "DFA by source token"


class About(NamedTuple):
    """What the SAE's own weights say of its features."""

    head_norm: NDArray[np.float32]
    """[d_sae, n_heads]"""
    neighbours: Sequence[list[list[Any]]]
    """[[index, cosine], ...] of each feature, nearest first."""


@dataclass(frozen=True)
class Layout:
    """A folder of dashboards: which files it has."""

    format: str
    folder: Path
    parts: tuple[int, ...]
    """Numbers of the batches, rising."""
    dataset: str
    n_tokens: int
    """Swept; 0 where nothing says it."""
    context: int
    skipped: frozenset[int]
    """Features that the files name as dead."""
    has_dfa: bool

    @property
    def source(self) -> dict[str, Any]:
        """What is kept with the harvest."""
        lacks = [*LACKING, *(() if self.has_dfa else (WITHOUT_DFA,))]
        return {
            "format": self.format,
            "path": str(self.folder),
            "dfa": "heads summed" if self.has_dfa else "none",
            "lacks": lacks,
        }


def look(folder: Path) -> Layout:
    """What kind of dashboards are in `folder`; UnreadableDashboards where none are, or batches are missing in between."""
    if not folder.is_dir():
        raise UnreadableDashboards(f"There is no folder {folder}; check the path.", field="location")
    if (folder / "features").is_dir():
        return _look_neuronpedia(folder)
    numbers = _numbers(folder, ".json")
    if not numbers:
        inside = sorted(found.parent for found in folder.glob("**/features") if found.is_dir())
        hint = f"; name one of its sources, such as {inside[0]}" if inside else ""
        raise UnreadableDashboards(
            f"{folder} has neither SAEDashboard's batch-0.json nor Neuronpedia's features/batch-0.jsonl.gz{hint}.",
            field="location",
        )
    _check_numbers(numbers, folder, "batch-{}.json")
    first = _saedashboard(folder, numbers[0])
    features = first["features"]
    one: dict[str, Any] = features[0] if features else {}
    activations = [a for feature in features for a in feature.get("activations", ())]
    skipped = folder / "skipped_indexes.json"
    return Layout(
        format=SAEDASHBOARD,
        folder=folder,
        parts=tuple(numbers),
        dataset=str(one.get("dataset") or ""),
        n_tokens=int(one.get("n_prompts_total") or 0) * int(one.get("n_tokens_in_prompt") or 0),
        context=max((len(a["tokens"]) for a in activations), default=0),
        skipped=frozenset(_json(skipped).get("skipped_indexes") or ()) if skipped.exists() else frozenset(),
        has_dfa=any(a.get("dfa_values") for a in activations),
    )


def _look_neuronpedia(folder: Path) -> Layout:
    numbers = _numbers(folder / "features", ".jsonl.gz")
    if not numbers:
        raise UnreadableDashboards(f"{folder / 'features'} has no batch-0.jsonl.gz; copy the whole source.", field="location")
    _check_numbers(numbers, folder / "features", "batch-{}.jsonl.gz")
    there = set(_numbers(folder / "activations", ".jsonl.gz"))
    missing = [f"activations/batch-{n}.jsonl.gz" for n in numbers if n not in there]
    if missing:
        raise UnreadableDashboards(f"{folder} lacks {_few(missing)}; copy the whole source.", field="location")
    some = next(iter(_lines(folder / "activations" / f"batch-{numbers[0]}.jsonl.gz")), {})
    source_file = folder / "source.jsonl"
    source = json.loads(source_file.read_text().splitlines()[0]) if source_file.exists() and source_file.stat().st_size else {}
    per_prompt = int(source.get("num_tokens_in_prompt") or source.get("numTokensInPrompt") or 0)
    return Layout(
        format=NEURONPEDIA,
        folder=folder,
        parts=tuple(numbers),
        dataset=str(source.get("dataset") or ""),
        n_tokens=int(source.get("num_prompts") or source.get("numPrompts") or 0) * per_prompt,
        context=len(some.get("tokens") or ()),
        skipped=frozenset(),
        has_dfa=bool(some.get("dfaValues")),
    )


def read(layout: Layout, number: int, about: About) -> Iterator[ForeignFeature]:
    """The features of one batch. UnreadableDashboards names the file and what is wrong with it."""
    found = _read_saedashboard(layout, number) if layout.format == SAEDASHBOARD else _read_neuronpedia(layout, number)
    d_sae = len(about.head_norm)
    for raw in found:
        if not 0 <= raw.feature < d_sae:
            raise UnreadableDashboards(
                f"Batch {number} of {layout.folder} has a feature {raw.feature}, and the SAE has {d_sae:,}; "
                "name the SAE that they are of.",
                field="sae",
            )
        yield _feature(raw, layout, about)


class _Activation(NamedTuple):
    tokens: list[str]
    values: list[float]
    low: float
    high: float
    contains: float
    """-1 for the strongest."""
    at: int | None
    dfa: list[float] | None
    dfa_at: int | None


class _Raw(NamedTuple):
    feature: int
    density: float
    fields: dict[str, Any]
    """By SAEDashboard's names, which are Neuronpedia's too."""
    activations: list[_Activation]
    labels: list[ForeignLabel]


# ---- the two kinds of files ----


def _saedashboard(folder: Path, number: int) -> dict[str, Any]:
    path = folder / f"batch-{number}.json"
    found = _json(path)
    features = found.get("features")
    if not isinstance(features, list):
        raise UnreadableDashboards(f"{path} holds no list of features, so it is no batch of SAEDashboard; make it again.")
    return found


def _read_saedashboard(layout: Layout, number: int) -> Iterator[_Raw]:
    path = layout.folder / f"batch-{number}.json"
    for feature in _saedashboard(layout.folder, number)["features"]:
        try:
            activations = [
                _Activation(
                    a["tokens"], a["values"], a["bin_min"], a["bin_max"], a["bin_contains"], a.get("qualifying_token_index"),
                    a.get("dfa_values"), a.get("dfa_targetIndex"),
                )
                for a in feature["activations"]
            ]  # fmt: skip
            yield _Raw(int(feature["feature_index"]), float(feature["frac_nonzero"]), feature, activations, [])
        except (KeyError, TypeError, ValueError) as error:
            raise UnreadableDashboards(f"A feature in {path} lacks or misstates {error}; make the file again.") from error


def _read_neuronpedia(layout: Layout, number: int) -> Iterator[_Raw]:
    name = f"batch-{number}.jsonl.gz"
    path = layout.folder / "activations" / name
    activations: dict[int, list[_Activation]] = {}
    try:
        for a in _lines(path):
            of = activations.setdefault(int(a["index"]), [])
            of.append(
                _Activation(
                    a["tokens"], a["values"], a.get("binMin") or 0, a.get("binMax") or 0, a.get("binContains") or 0,
                    a.get("qualifyingTokenIndex"), a.get("dfaValues"), a.get("dfaTargetIndex"),
                )
            )  # fmt: skip
        labels = _explanations(layout.folder / "explanations" / name)
        path = layout.folder / "features" / name
        for feature in _lines(path):
            index = int(feature["index"])
            of = activations.get(index, [])
            yield _Raw(index, float(feature.get("frac_nonzero") or 0), feature, of, labels.get(index, []))
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableDashboards(f"A line of {path} lacks or misstates {error}; copy the file again.") from error


def _explanations(path: Path) -> dict[int, list[ForeignLabel]]:
    found: dict[int, list[ForeignLabel]] = {}
    for line in _lines(path) if path.exists() else ():
        method = line.get("typeName") or "imported"
        label = ForeignLabel(line["description"], line.get("explanationModelName") or method, method)
        found.setdefault(int(line["index"]), []).append(label)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = from_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UnreadableDashboards(f"{path} is missing; copy the whole folder.") from error
    except (OSError, ValueError) as error:
        raise UnreadableDashboards(f"{path} cannot be read as JSON ({str(error)[:200]}); copy it again.") from error
    if not isinstance(found, dict):
        raise UnreadableDashboards(f"{path} holds no JSON object; copy it again.")
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path) as file:
            for line in file:
                if line.strip():
                    yield from_json(line)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UnreadableDashboards(f"{path} cannot be read ({str(error)[:200]}); copy it again.") from error


def _numbers(folder: Path, suffix: str) -> list[int]:
    names = [BATCH.match(path.name) for path in folder.glob(f"batch-*{suffix}")] if folder.is_dir() else []
    return sorted(int(name[1]) for name in names if name)


def _check_numbers(numbers: list[int], folder: Path, name: str) -> None:
    missing = [name.format(n) for n in range(numbers[-1] + 1) if n not in set(numbers)]
    if missing:
        raise UnreadableDashboards(f"{folder} lacks {_few(missing)}; copy the whole folder.", field="location")


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def missing_features(covered: set[int], layout: Layout, d_sae: int) -> str | None:
    """A sentence that names features which are in no file and not said to be dead; None where all are there."""
    lacking = sorted(set(range(d_sae)) - covered - layout.skipped)
    if not lacking:
        return None
    return (
        f"{len(lacking):,} of {d_sae:,} features are in no file of {layout.folder}: {_few([str(i) for i in lacking])}; "
        "add the batches that have them and run the job again, or take what there is with --partial true."
    )


# ---- one feature ----


def _feature(raw: _Raw, layout: Layout, about: About) -> ForeignFeature:
    examples, bands = _examples(raw.activations)
    counts = [round(n) for n in raw.fields.get("freq_hist_data_bar_heights") or ()]
    centres = [float(c) for c in raw.fields.get("freq_hist_data_bar_values") or ()]
    largest = max((float(e.value.max()) for e in examples), default=0.0)
    swept = layout.n_tokens
    n_fired = sum(counts) or max(round(raw.density * swept), 1 if examples else 0)
    known = len(counts) == len(centres) > 0 and sum(counts) > 0
    acts = [e.act for e in examples]
    mean = sum(n * c for n, c in zip(counts, centres, strict=True)) / sum(counts) if known else float(np.mean(acts or [0.0]))
    record = feature_record(
        raw.feature,
        about,
        n_fired=n_fired,
        density=raw.density or (n_fired / swept if swept else 0.0),
        max_act=max(largest, float(raw.fields.get("maxActApprox") or 0.0)),
        mean_act=mean,
        histogram=_histogram(centres, counts) if known else {},
        bands=[{"low": low, "high": high, "count": round(share * n_fired)} for low, high, share in bands],
        promoted=_tokens(raw.fields, "pos"),
        suppressed=_tokens(raw.fields, "neg"),
        logits=_histogram(
            [float(c) for c in raw.fields.get("logits_hist_data_bar_values") or ()],
            [round(n) for n in raw.fields.get("logits_hist_data_bar_heights") or ()],
        ),
    )
    return ForeignFeature(record, examples, raw.labels)


def feature_record(index: int, about: About, **known: Any) -> FeatureRecord:
    """A feature of which the files say what is `known`, and nothing else; dead without it."""
    norm = about.head_norm[index]
    nothing: dict[str, Any] = {
        "n_fired": 0, "density": 0.0, "max_act": 0.0, "mean_act": 0.0, "histogram": {}, "bands": [], "promoted": [],
        "suppressed": [],
    }  # fmt: skip
    none = np.zeros(0, np.float32)
    return FeatureRecord(
        idx=index,
        top_head=int(norm.argmax()),
        top_head_share=float(norm.max()),
        top_head_dfa=None,
        top_head_dfa_share=None,
        distance=None,
        family=None,
        family_score=None,
        head_norm=norm,
        head_dfa=none,
        head_dfa_std=none,
        neighbours=about.neighbours[index],
        evidence={},
        **(nothing | known),
    )


def _examples(activations: list[_Activation]) -> tuple[list[ForeignExample], list[tuple[float, float, float]]]:
    """Examples by band, strongest first, and the bands: (low, high, share of the firings)."""
    groups: dict[tuple[float, float], list[_Activation]] = {}
    strongest: list[_Activation] = []
    for one in activations:
        of = strongest if one.contains == -1 or one.low == -1 else groups.setdefault((one.low, one.high), [])
        of.append(one)
    ranges = sorted(groups, key=lambda range_: -range_[1])
    found: list[ForeignExample] = []
    for band, members in enumerate([strongest, *(groups[one] for one in ranges)]):
        made = [example for one in members if (example := _example(one, band)) is not None]
        made.sort(key=lambda example: -example.act)
        found += [replace(example, rank=rank) for rank, example in enumerate(made)]
    return found, [(low, high, float(groups[low, high][0].contains)) for low, high in ranges]


def _example(one: _Activation, band: int) -> ForeignExample | None:
    values = np.asarray(one.values, np.float64)
    if len(values) != len(one.tokens):
        raise ValueError(f"values, of which there are {len(values)} for {len(one.tokens)} tokens")
    pos = np.flatnonzero(values > 0)
    if not len(pos):
        return None
    dest = one.at if one.at is not None and 0 <= one.at < len(values) and values[one.at] > 0 else int(values.argmax())
    dfa = None
    if one.dfa and one.dfa_at == dest and len(one.dfa) == len(values):
        dfa = np.asarray(one.dfa, np.float64)
        dfa[dest + 1 :] = 0.0  # what is after the destination gave nothing
    return ForeignExample(band, 0, dest, float(values[dest]), tuple(one.tokens), pos, values[pos], dfa)


def _histogram(centres: list[float], counts: list[int]) -> dict[str, Any]:
    """Bars by their middles, of equal width or equal in log, as edges and counts."""
    if len(centres) < 2 or len(centres) != len(counts):
        return {}
    if _in_log(centres):  # as our own are, whose middles are equal in log
        half = (centres[-1] / centres[0]) ** (0.5 / (len(centres) - 1))
        return {"edges": [centres[0] / half, centres[-1] * half], "counts": counts}
    half = (centres[-1] - centres[0]) / (len(centres) - 1) / 2
    return {"edges": [centres[0] - half, centres[-1] + half], "counts": counts, "spacing": "equal"}


def _in_log(centres: list[float]) -> bool:
    if centres[0] <= 0 or len(centres) < 3:
        return False
    steps, ratios = np.diff(centres), np.diff(np.log(centres))
    return bool(np.ptp(ratios) < 1e-3 * ratios.mean() and np.ptp(steps) > 0.1 * steps.mean())


def _tokens(fields: dict[str, Any], side: str) -> list[list[Any]]:
    """Promoted or suppressed tokens; their ids are not known."""
    texts, values = fields.get(f"{side}_str") or (), fields.get(f"{side}_values") or ()
    return [[-1, text, float(value)] for text, value in zip(texts, values, strict=False)]
