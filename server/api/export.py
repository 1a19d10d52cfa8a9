"""A selection of features as a file, made while it is sent: as many at a time as fit into little memory, whatever the size.

The request's own session ends with the handler, so each part is read in a short one of its own. A published harvest never
changes, so the parts fit together; where it is deleted meanwhile, or labels that are filtered by change, the stream breaks off
instead of ending as if it were whole.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter
from starlette.responses import StreamingResponse

from sae_core.errors import MachineError
from server.api import parts
from server.api.parts import FeatureParts, Include
from server.pages.csv_file import cell
from server.pages.reply import file_name
from server.store.features import FeatureFilter, feature_pages, walk_of
from server.store.saes import Door
from server.store.walk import Place

if TYPE_CHECKING:
    from server.db import Database

MEDIA = {"jsonl": "application/jsonl", "csv": "text/csv", "parquet": "application/vnd.apache.parquet"}
WALKED = 2000
"""Features whose places are looked up at once."""
READ, READ_WITH_EXAMPLES = 50, 10
"""Features that are read at once; the objects of one with all its examples take a megabyte."""
ROWS_OF_A_GROUP, WITH_EXAMPLES = 500, 20
"""Features of a Parquet row group, which is held in memory twice while it is made."""


class NoParquet(MachineError):
    """pyarrow is not installed here."""


class Selection(FeatureFilter, Include):
    """Which features are exported, what of each, and how."""

    format: Literal["jsonl", "csv", "parquet"] = "jsonl"
    """Form of the file."""


@dataclass(frozen=True)
class Source:
    """Where an export is read."""

    db: "Database"
    door: Door
    query: Selection
    count: int
    """How many features that are."""

    def read(self, n_at_once: int | None = None) -> Iterator[list[FeatureParts]]:
        """The features selected, in order, some at a time."""
        query, asked = self.query, self.query.parts
        sent, examples = 0, not asked.isdisjoint(parts.OF_EXAMPLES)
        n_at_once = n_at_once or (READ_WITH_EXAMPLES if examples else READ)
        wanted: dict[str, Any] = {"others": "others" in asked, "examples": examples, "parts": asked}
        for indices in self._walked():
            for begin in range(0, len(indices), n_at_once):
                with self.db.read() as session:
                    part = indices[begin : begin + n_at_once]
                    pages = feature_pages(session, self.door, part, every=query.all_examples, **wanted)
                sent += len(pages)
                yield [parts.of_page(page, asked) for page in pages]
        if sent != self.count:  # the answer's status is sent: all that can be done is to break off, which a client sees
            raise RuntimeError(f"{self.door.sae.name} was to give {self.count} features and gave {sent}: it changed meanwhile.")

    def _walked(self) -> Iterator[list[int]]:
        walk, at = walk_of(self.door, self.query), None
        while True:
            with self.db.read() as session:
                places: list[Place] = walk.from_(session, at, WALKED)
            if places:
                yield [place.idx for place in places]
                at = places[-1]
            if len(places) < WALKED:
                return


def exported(source: Source) -> StreamingResponse:
    """The reply that streams it; what cannot be is refused before it begins."""
    kind = source.query.format
    make: Callable[[Source], Iterator[bytes]] = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}[kind]
    if kind == "parquet":
        _pyarrow()
    headers = {
        "Content-Disposition": f'attachment; filename="{file_name(f"{source.door.sae.name}-features")}.{kind}"',
        "Cache-Control": "private, no-cache",
        "X-Headscope-Features": str(source.count),
    }
    return StreamingResponse(make(source), 200, headers, media_type=MEDIA[kind])


_MANY: TypeAdapter[FeatureParts] = TypeAdapter(FeatureParts)


def _jsonl(source: Source) -> Iterator[bytes]:
    for part in source.read():
        yield b"".join(_MANY.dump_json(one) + b"\n" for one in part)


# ---- tables ----


def columns(asked: frozenset[str]) -> list[str]:
    """A table's columns: every number of a feature, and a column for each part asked for."""
    kept = asked | ({"examples", "kept"} if not asked.isdisjoint(parts.OF_EXAMPLES) else set())
    optional = {*parts.PARTS, "kept"}
    return [field.name for field in fields(FeatureParts) if field.name not in optional or field.name in kept]


def _csv(source: Source) -> Iterator[bytes]:
    names = columns(source.query.parts)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(names)
    for part in source.read():
        for one in part:
            line = _MANY.dump_python(one, mode="json")
            writer.writerow([cell(_flat(line[name])) for name in names])
        yield text.getvalue().encode()
        text.seek(0)
        text.truncate()
    yield text.getvalue().encode()


def _flat(value: Any) -> Any:
    """A value of a CSV's cell; what is more than one is JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) if isinstance(value, dict | list) else value


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise NoParquet(
            "Parquet needs pyarrow, which is not installed here: pip install pyarrow. JSON lines and CSV need nothing.",
            field="format",
        ) from error
    return pyarrow


class _Sink(io.RawIOBase):
    """Takes what is written and gives it on in pieces."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self.pieces.append(bytes(piece))
        return len(piece)

    def taken(self) -> bytes:
        """What was written since."""
        joined = b"".join(self.pieces)
        self.pieces.clear()
        return joined


def _parquet(source: Source) -> Iterator[bytes]:
    pa = _pyarrow()
    names = columns(source.query.parts)
    hints = get_type_hints(FeatureParts)
    schema = pa.schema([pa.field(name, _arrow(pa, hints[name])) for name in names])
    sink = _Sink()
    with pa.parquet.ParquetWriter(pa.PythonFile(sink, "w"), schema, compression="zstd") as writer:
        for part in source.read(WITH_EXAMPLES if "examples" in names else ROWS_OF_A_GROUP):
            rows = [_MANY.dump_python(one, mode="python", include=set(names)) for one in part]
            writer.write_table(pa.Table.from_pylist([_for_arrow(row, FeatureParts) for row in rows], schema))
            yield sink.taken()
    yield sink.taken()


def _arrow(pa: Any, kind: Any) -> Any:
    """The Arrow type of what a dataclass' field holds; a mapping of names to anything is text, as JSON."""
    kind = _present(kind)
    if simple := {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}.get(kind):
        return simple
    if get_origin(kind) is Literal:
        return pa.string()
    if get_origin(kind) is tuple:
        return pa.list_(_arrow(pa, get_args(kind)[0]))
    if get_origin(kind) is dict:
        key, value = get_args(kind)
        return pa.string() if value is Any else pa.map_(_arrow(pa, key), _arrow(pa, value))
    return pa.struct([pa.field(name, _arrow(pa, hint)) for name, hint in get_type_hints(kind).items()])


def _present(kind: Any) -> Any:
    """`kind` without None."""
    if get_origin(kind) in (Union, UnionType):
        return next(arm for arm in get_args(kind) if arm is not NoneType)
    return kind


def _for_arrow(value: Any, kind: Any) -> Any:
    """A dumped value in the form that `_arrow` of its type takes: mappings as pairs, or as JSON."""
    kind = _present(kind)
    if value is None or kind in (int, float, str, bool) or get_origin(kind) is Literal:
        return value
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return value if inner in (int, float, str) else [_for_arrow(one, inner) for one in value]
    if get_origin(kind) is dict:
        return json.dumps(value, ensure_ascii=False) if get_args(kind)[1] is Any else list(value.items())
    hints = _hints(kind)
    return {name: _for_arrow(inner, hints[name]) for name, inner in value.items()}


def _hints(kind: type) -> dict[str, Any]:
    if kind not in _known:
        _known[kind] = get_type_hints(kind)
    return _known[kind]


_known: dict[type, dict[str, Any]] = {}
