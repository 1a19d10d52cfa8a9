"""Reading dashboards: SAEDashboard's `batch-*.json`, and Neuronpedia's bulk `*.jsonl.gz`.

SAEDashboard fills up its groups with examples on which the feature does not fire, and pairs every example of a prompt with the
DFA of the prompt's strongest token. So an example without a positive activation is left out, and DFA is taken only where its
target is the example's own destination.

Most of an import is reading numbers, so only what is needed is decoded: a prompt's tokens once, by their JSON as it stands, and
numbers straight to arrays, a feature's examples at a time, by simdjson where it is installed.
"""

import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Raw, Struct
from numpy.typing import NDArray
from pydantic_core import from_json

from sae_core.errors import UnreadableDashboards
from sae_core.records import FeatureRecord
from server.store.foreign import ForeignExamples, ForeignFeature, ForeignLabel, text_key

try:
    import simdjson
except ImportError:  # which has no wheel for every Python; without it reading takes half as long again
    simdjson = None  # type: ignore[assignment]

BATCH = re.compile(r"^batch-(\d+)\.(?:json|jsonl\.gz)$")
SAEDASHBOARD, NEURONPEDIA = "SAEDashboard", "Neuronpedia"
LACKING = ("DFA by head", "head shares by data", "families", "firings by position", "features that fire together")
WITHOUT_DFA = "DFA by source token"
MOST_PROMPTS = 200_000
"""Prompts that a process remembers."""
BOUNDS = ("low", "high", "contains")


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

    def size(self, numbers: Sequence[int]) -> int:
        """Bytes of these batches."""
        if self.format == SAEDASHBOARD:
            files = [self.folder / f"batch-{number}.json" for number in numbers]
        else:
            files = [self.folder / "activations" / f"batch-{number}.jsonl.gz" for number in numbers]
        return sum(file.stat().st_size for file in files if file.exists())

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
    path = folder / f"batch-{numbers[0]}.json"
    features = _decoded(path, path, _BATCH).features
    one = features[0] if features else _Feature(feature_index=-1, frac_nonzero=0, activations=[])
    activations = [a for feature in features for a in feature.activations]
    skipped = folder / "skipped_indexes.json"
    return Layout(
        format=SAEDASHBOARD,
        folder=folder,
        parts=tuple(numbers),
        dataset=one.dataset or "",
        n_tokens=(one.n_prompts_total or 0) * (one.n_tokens_in_prompt or 0),
        context=max(_lengths([a.values for a in activations]), default=0),
        skipped=frozenset(_decoded(skipped, skipped, _SKIPPED).skipped_indexes or ()) if skipped.exists() else frozenset(),
        has_dfa=any(_lengths([a.dfa for a in activations])),
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
    some = next(_lines(folder / "activations" / f"batch-{numbers[0]}.jsonl.gz", _ACTIVATION), None)
    source_file = folder / "source.jsonl"
    source = next(_lines(source_file, _SOURCE), _Source()) if source_file.exists() else _Source()
    return Layout(
        format=NEURONPEDIA,
        folder=folder,
        parts=tuple(numbers),
        dataset=source.dataset or "",
        n_tokens=(source.num_prompts or source.prompts or 0) * (source.num_tokens_in_prompt or source.tokens_in_prompt or 0),
        context=_lengths([some.values])[0] if some else 0,
        skipped=frozenset(),
        has_dfa=bool(some and _lengths([some.dfa])[0]),
    )


# ---- what is read of the files: the rest is passed over ----


_ABSENT = Raw()


class _Shown(Struct, gc=False):
    """A prompt with a feature's activations, as SAEDashboard has it."""

    tokens: Raw
    values: Raw
    """Numbers, as they stand; and so `dfa`."""
    low: float = msgspec.field(name="bin_min")
    high: float = msgspec.field(name="bin_max")
    contains: float = msgspec.field(name="bin_contains")
    """-1 for the strongest."""
    at: int | None = msgspec.field(name="qualifying_token_index", default=None)
    dfa: Raw = msgspec.field(name="dfa_values", default=_ABSENT)
    dfa_at: int | None = msgspec.field(name="dfa_targetIndex", default=None)


class _ShownLine(Struct, gc=False):
    """The same, as a line of Neuronpedia's."""

    index: int | str
    tokens: Raw
    values: Raw
    """Numbers, as they stand; and so `dfa`."""
    low: float | None = msgspec.field(name="binMin", default=None)
    high: float | None = msgspec.field(name="binMax", default=None)
    contains: float | None = msgspec.field(name="binContains", default=None)
    at: int | None = msgspec.field(name="qualifyingTokenIndex", default=None)
    dfa: Raw = msgspec.field(name="dfaValues", default=_ABSENT)
    dfa_at: int | None = msgspec.field(name="dfaTargetIndex", default=None)


class _Fields(Struct):
    """What both say of a feature."""

    frac_nonzero: float | None = None
    heights: list[float] | None = msgspec.field(name="freq_hist_data_bar_heights", default=None)
    middles: list[float] | None = msgspec.field(name="freq_hist_data_bar_values", default=None)
    logit_heights: list[float] | None = msgspec.field(name="logits_hist_data_bar_heights", default=None)
    logit_middles: list[float] | None = msgspec.field(name="logits_hist_data_bar_values", default=None)
    pos_str: list[str] | None = None
    pos_values: list[float] | None = None
    neg_str: list[str] | None = None
    neg_values: list[float] | None = None
    largest: float | None = msgspec.field(name="maxActApprox", default=None)


class _Feature(_Fields, kw_only=True):
    """A feature of SAEDashboard's."""

    feature_index: int
    frac_nonzero: float
    activations: list[_Shown]
    dataset: str | None = None
    n_prompts_total: int | None = None
    n_tokens_in_prompt: int | None = None


class _FeatureLine(_Fields, kw_only=True):
    """A feature of Neuronpedia's."""

    index: int | str


class _Explained(Struct):
    """A line of Neuronpedia's explanations."""

    index: int | str
    description: str
    method: str | None = msgspec.field(name="typeName", default=None)
    model: str | None = msgspec.field(name="explanationModelName", default=None)


class _Batch(Struct):
    features: list[_Feature]


class _Skipped(Struct):
    skipped_indexes: list[int] | None = None


class _Source(Struct):
    dataset: str | None = None
    num_prompts: int | None = None
    num_tokens_in_prompt: int | None = None
    prompts: int | None = msgspec.field(name="numPrompts", default=None)
    tokens_in_prompt: int | None = msgspec.field(name="numTokensInPrompt", default=None)


_BATCH: msgspec.json.Decoder[_Batch] = msgspec.json.Decoder(_Batch)
_SKIPPED: msgspec.json.Decoder[_Skipped] = msgspec.json.Decoder(_Skipped)
_FEATURE_LINE: msgspec.json.Decoder[_FeatureLine] = msgspec.json.Decoder(_FeatureLine)
_ACTIVATION: msgspec.json.Decoder[_ShownLine] = msgspec.json.Decoder(_ShownLine)
_EXPLAINED: msgspec.json.Decoder[_Explained] = msgspec.json.Decoder(_Explained)
_SOURCE: msgspec.json.Decoder[_Source] = msgspec.json.Decoder(_Source)
_TOKENS: msgspec.json.Decoder[list[str]] = msgspec.json.Decoder(list[str])
_NUMBERS: msgspec.json.Decoder[Any] = msgspec.json.Decoder(list[float] | None)

T = TypeVar("T")


def _decoded(path: Path | str, given: Path | Raw | bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """What `given`, a part of the file or the file itself, holds; `path` says where it stands."""
    try:
        data = given.read_bytes() if isinstance(given, Path) else given
        try:
            return decoder.decode(data)
        except msgspec.DecodeError as error:
            # Python writes numbers that are none as NaN, which is no JSON. Only where none is needed can it be passed over.
            if isinstance(error, msgspec.ValidationError) or (b"NaN" not in bytes(data) and b"Infinity" not in bytes(data)):
                raise
            return decoder.decode(msgspec.json.encode(from_json(bytes(data))))
    except FileNotFoundError as error:
        raise UnreadableDashboards(f"{path} is missing; copy the whole folder.") from error
    except msgspec.ValidationError as error:
        raise UnreadableDashboards(f"{path} lacks or misstates something: {error}; make the file again.") from error
    except (OSError, ValueError) as error:
        raise UnreadableDashboards(f"{path} cannot be read as JSON ({str(error)[:200]}); copy it again.") from error


def _lines(path: Path, decoder: msgspec.json.Decoder[T]) -> Iterator[T]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield _decoded(path, line, decoder)
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableDashboards(f"{path} cannot be read ({str(error)[:200]}); copy it again.") from error


@dataclass
class Prompts:
    """The prompts of all files that a process reads, by their JSON as it stands: each is read once, however many features
    show it, and handed on with the first of them."""

    seen: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    """Digest of the JSON: the text's key, and of how many tokens it is."""
    fresh: dict[bytes, list[str]] = field(default_factory=dict)
    """Texts that were not handed on yet."""

    def of(self, raw: Raw) -> tuple[bytes, int]:
        """The text's key and how many tokens it has; ValueError where it is no list of texts."""
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        found = self.seen.get(digest)
        if found is None:
            if len(self.seen) > MOST_PROMPTS:
                self.seen.clear()
            texts = [text.replace("\0", "\u2400") for text in _TOKENS.decode(raw)]  # as the database writes it
            found = self.seen[digest] = (text_key(texts), len(texts))
            self.fresh[found[0]] = texts
        return found

    def taken(self) -> dict[bytes, list[str]]:
        """The texts since the last time."""
        fresh, self.fresh = self.fresh, {}
        return fresh


# ---- the two kinds of files ----


def read(layout: Layout, number: int, about: About, prompts: Prompts | None = None) -> Iterator[ForeignFeature]:
    """The features of one batch, with the texts that `prompts` has not seen. UnreadableDashboards names the file and what is
    wrong with it."""
    prompts = Prompts() if prompts is None else prompts
    found = _read_saedashboard if layout.format == SAEDASHBOARD else _read_neuronpedia
    d_sae = len(about.head_norm)
    for index, fields, block, labels in found(layout.folder, number, prompts):
        if not 0 <= index < d_sae:
            raise UnreadableDashboards(
                f"Batch {number} of {layout.folder} has a feature {index}, and the SAE has {d_sae:,}; "
                "name the SAE that they are of.",
                field="sae",
            )
        yield _feature(index, fields, block, labels, layout, about, prompts)


_Read = Iterator[tuple[int, _Fields, "_Block", list[ForeignLabel]]]


def _read_saedashboard(folder: Path, number: int, prompts: Prompts) -> _Read:
    path = folder / f"batch-{number}.json"
    for feature in _decoded(path, path, _BATCH).features:
        yield feature.feature_index, feature, _block(path, feature.feature_index, feature.activations, prompts), []


def _read_neuronpedia(folder: Path, number: int, prompts: Prompts) -> _Read:
    name = f"batch-{number}.jsonl.gz"
    path, blocks = folder / "activations" / name, dict[int, list[_Block]]()
    for said, lines in groupby(_lines(path, _ACTIVATION), attrgetter("index")):
        index = _index(said, path)
        blocks.setdefault(index, []).append(_block(path, index, list(lines), prompts))
    labels = _explanations(folder / "explanations" / name)
    path = folder / "features" / name
    for feature in _lines(path, _FEATURE_LINE):
        index = _index(feature.index, path)
        yield index, feature, _joined(blocks.pop(index, [_NOTHING])), labels.get(index, [])


def _explanations(path: Path) -> dict[int, list[ForeignLabel]]:
    found: dict[int, list[ForeignLabel]] = {}
    for line in _lines(path, _EXPLAINED) if path.exists() else ():
        method = line.method or "imported"
        found.setdefault(_index(line.index, path), []).append(ForeignLabel(line.description, line.model or method, method))
    return found


def _index(said: int | str, path: Path) -> int:
    if not isinstance(said, int) and not said.isdecimal():
        raise UnreadableDashboards(f"A line of {path} says the index {said!r}, which is no number; copy the file again.")
    return int(said)


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

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Block(NamedTuple):
    """Examples of a feature in the order of the file: what fires nowhere is left out."""

    keys: list[bytes]
    low: Floats
    high: Floats
    contains: Floats
    dest: Ints
    act: Floats
    fired: Ints
    """[n]: how many of `pos` and `value` are each one's."""
    pos: Ints
    value: Floats
    attributed: NDArray[np.bool_]
    """[n]: whether it has DFA of its own destination."""
    sources: Ints
    """[n]: how many of `src` and `dfa` are each one's."""
    src: Ints
    dfa: Floats


def _block(path: Path, index: int, shown: Sequence[_Shown | _ShownLine], prompts: Prompts) -> _Block:
    """The examples among what is shown of a feature."""
    try:
        texts = [prompts.of(one.tokens) for one in shown]
    except ValueError as error:
        raise UnreadableDashboards(
            f"Feature {index} in {path} has tokens that are no list of texts ({str(error)[:200]}); make the file again."
        ) from error
    lengths, flat = _numbers_of(f"{path}, feature {index}, values", [one.values for one in shown])
    if wrong := [(n, of) for n, (_, of) in zip(lengths.tolist(), texts, strict=True) if n != of]:
        n, of = wrong[0]
        raise UnreadableDashboards(
            f"Feature {index} in {path} has values, of which there are {n} for {of} tokens; make the file again."
        )
    if not lengths.all():
        kept = np.flatnonzero(lengths).tolist()
        if not kept:
            return _NOTHING
        shown, texts, lengths = [shown[at] for at in kept], [texts[at] for at in kept], lengths[kept]
    group = np.repeat(np.arange(len(shown)), lengths)
    begins = np.cumsum(lengths) - lengths
    at_value = np.flatnonzero(flat > 0)
    whose_value = group[at_value]
    said = np.array([-1 if one.at is None else one.at for one in shown], np.int64)
    stated = (said >= 0) & (said < lengths)
    said[~stated] = 0
    hits = np.flatnonzero(flat == np.maximum.reduceat(flat, begins)[group])
    strongest = hits[np.searchsorted(hits, begins)] - begins  # the first of several
    dest = np.where(stated & (flat[begins + said] > 0), said, strongest)

    # DFA of another destination than the example's says nothing of the example.
    mine = [at for at, (one, to) in enumerate(zip(shown, dest.tolist(), strict=True)) if one.dfa and one.dfa_at == to]
    given, dfa = np.zeros_like(lengths), _NO_FLOATS
    if mine:
        given[mine], dfa = _numbers_of(f"{path}, feature {index}, DFA", [shown[at].dfa for at in mine])
        if (given[mine] != lengths[mine]).any():
            whole = given == lengths
            dfa = dfa[np.repeat(whole, given)]
            given[~whole] = 0
    whose = np.repeat(np.arange(len(shown)), given)
    src = np.arange(len(dfa)) - (np.cumsum(given) - given)[whose]
    gave = np.flatnonzero((dfa != 0) & (src <= dest[whose]))  # what is after the destination gave nothing
    low, high, contains = (np.array([getattr(one, name) or 0.0 for one in shown], np.float64) for name in BOUNDS)
    block = _Block(
        [key for key, _ in texts], low, high, contains, dest, flat[begins + dest],
        np.bincount(whose_value, minlength=len(shown)), at_value - begins[whose_value], flat[at_value],
        given > 0, np.bincount(whose[gave], minlength=len(shown)), src[gave], dfa[gave],
    )  # fmt: skip
    return block if block.fired.all() else _taken(block, np.flatnonzero(block.fired))


def _lengths(lists: Sequence[Raw]) -> list[int]:
    """How many numbers each has, by its JSON as it stands, were it a list of numbers."""
    plain = [bytes(one) for one in lists]
    return [one.count(b",") + 1 if len(one) > _SHORT or one.translate(None, b" \n\r\t") not in _EMPTY else 0 for one in plain]


_SHORT, _EMPTY = 64, (b"", b"[]", b"null")


def _numbers_of(what: str, lists: Sequence[Raw]) -> tuple[Ints, Floats]:
    """How long each list is, and their numbers one after the other; `what` they are, for an error."""
    if _PARSER:
        joined = b"[" + b",".join([one or b"[]" for one in lists]) + b"]"
        counts = _lengths(lists)
        try:
            found: Any = _PARSER.parse(joined)
            flat = np.frombuffer(found.as_buffer(of_type="d"), np.float64)
        except (ValueError, TypeError, RuntimeError):
            pass  # something else stands among them, which is named below
        else:
            if len(flat) == sum(counts) and joined.count(b"[") == len(lists) + 1:
                return np.array(counts, np.int64), flat
    read = [_decoded(f"{what} of example {at}", one, _NUMBERS) or [] if one else [] for at, one in enumerate(lists)]
    lengths = np.fromiter(map(len, read), np.int64, len(read))
    return lengths, np.fromiter(chain.from_iterable(read), np.float64, int(lengths.sum()))


_PARSER = simdjson.Parser() if simdjson else None


def _taken(block: _Block, order: Ints) -> _Block:
    """Some of a block's examples, in this order."""
    fired, sources = _of(block.fired, order), _of(block.sources, order)
    return _Block(
        [block.keys[at] for at in order.tolist()], block.low[order], block.high[order], block.contains[order], block.dest[order],
        block.act[order], block.fired[order], block.pos[fired], block.value[fired], block.attributed[order],
        block.sources[order], block.src[sources], block.dfa[sources],
    )  # fmt: skip


def _of(counts: Ints, order: Ints) -> Ints:
    """Where the members of groups lie that are taken in this order."""
    begins, taken = (np.cumsum(counts) - counts)[order], counts[order]
    found: Ints = np.repeat(begins - (np.cumsum(taken) - taken), taken) + np.arange(int(taken.sum()))
    return found


def _joined(blocks: Sequence[_Block]) -> _Block:
    if len(blocks) == 1:
        return blocks[0]
    keys, *arrays = zip(*blocks, strict=True)
    return _Block(list(chain.from_iterable(keys)), *(np.concatenate(parts) for parts in arrays))


def _feature(
    index: int, fields: _Fields, block: _Block, labels: list[ForeignLabel], layout: Layout, about: About, prompts: Prompts
) -> ForeignFeature:
    examples, bands = _examples(block)
    counts, centres = [round(n) for n in fields.heights or ()], fields.middles or []
    swept, density = layout.n_tokens, fields.frac_nonzero or 0.0
    n_fired = sum(counts) or max(round(density * swept), 1 if len(block.keys) else 0)
    known = len(counts) == len(centres) > 0 and sum(counts) > 0
    mean = (
        sum(n * c for n, c in zip(counts, centres, strict=True)) / sum(counts)
        if known
        else float(block.act.mean() if n_fired and len(block.act) else 0.0)
    )
    record = feature_record(
        index,
        about,
        n_fired=n_fired,
        density=density or (n_fired / swept if swept else 0.0),
        max_act=max(float(block.value.max(initial=0.0)), fields.largest or 0.0),
        mean_act=mean,
        histogram=_histogram(centres, counts) if known else {},
        bands=[{"low": low, "high": high, "count": round(share * n_fired)} for low, high, share in bands],
        promoted=_tokens(fields.pos_str, fields.pos_values),
        suppressed=_tokens(fields.neg_str, fields.neg_values),
        logits=_histogram(fields.logit_middles or [], [round(n) for n in fields.logit_heights or ()]),
    )
    return ForeignFeature(record, examples, prompts.taken(), labels)


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


def _examples(block: _Block) -> tuple[ForeignExamples, list[tuple[float, float, float]]]:
    """Examples by band, strongest first, and the bands: (low, high, share of the firings)."""
    drawn = (block.contains != -1) & (block.low != -1)
    ranges = list(zip(block.low.tolist(), block.high.tolist(), strict=True))
    shares: dict[tuple[float, float], float] = {}
    for range_, share, is_drawn in zip(ranges, block.contains.tolist(), drawn.tolist(), strict=True):
        if is_drawn:
            shares.setdefault(range_, share)
    bands = sorted(shares, key=lambda range_: -range_[1])
    number = {range_: band for band, range_ in enumerate(bands, 1)}
    band = np.array([number[range_] if of else 0 for range_, of in zip(ranges, drawn.tolist(), strict=True)], np.int64)
    order = np.lexsort((-block.act, band))
    band, block = band[order], _taken(block, order)
    rank = np.arange(len(band)) - np.searchsorted(band, band)
    found = ForeignExamples(
        band, rank, block.dest, block.act, block.keys, block.fired, block.pos, block.value, block.attributed, block.sources,
        block.src, block.dfa,
    )  # fmt: skip
    return found, [(*range_, shares[range_]) for range_ in bands]


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
    if min(centres) <= 0 or len(centres) < 3:
        return False
    steps = [b - a for a, b in pairwise(centres)]  # without numpy, which takes its time by the call: all features have two
    if max(steps) - min(steps) <= 0.1 * sum(steps) / len(steps):
        return False
    ratios = [math.log(b / a) for a, b in pairwise(centres)]
    return max(ratios) - min(ratios) < 1e-3 * sum(ratios) / len(ratios)


def _tokens(texts: list[str] | None, values: list[float] | None) -> list[list[Any]]:
    """Promoted or suppressed tokens; their ids are not known."""
    return [[-1, text, value] for text, value in zip(texts or (), values or (), strict=False)]


_NO_INTS, _NO_FLOATS = np.zeros(0, np.int64), np.zeros(0)
_NOTHING = _Block(
    [], _NO_FLOATS, _NO_FLOATS, _NO_FLOATS, _NO_INTS, _NO_FLOATS, _NO_INTS, _NO_INTS, _NO_FLOATS, np.zeros(0, np.bool_), _NO_INTS,
    _NO_INTS, _NO_FLOATS,
)  # fmt: skip
