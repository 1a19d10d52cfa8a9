"""A selection of features as a file, made while it is sent: as many at a time as fit into little memory, whatever the size.

The request's own session ends with the handler, so each part is read in a short one of its own. A published harvest never
changes, so the parts fit together; where it is deleted meanwhile, or labels that are filtered by change, the stream breaks off
instead of ending as if it were whole.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate, chain
from operator import attrgetter
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
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
ROWS_OF_A_GROUP, WITH_EXAMPLES = 500, 50
"""Features of a Parquet row group; what is said of each group stays in memory to the file's end."""


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
        examples = not self.query.parts.isdisjoint(parts.OF_EXAMPLES)
        n_at_once = n_at_once or (READ_WITH_EXAMPLES if examples else READ)
        sent = 0
        for indices in self._walked():
            for begin in range(0, len(indices), n_at_once):
                found = self._found(indices[begin : begin + n_at_once], examples)
                sent += len(found)
                yield found
                del found
        if sent != self.count:  # the answer's status is sent: all that can be done is to break off, which a client sees
            raise RuntimeError(f"{self.door.sae.name} was to give {self.count} features and gave {sent}: it changed meanwhile.")

    def _found(self, indices: Sequence[int], examples: bool) -> list[FeatureParts]:
        asked, every = self.query.parts, self.query.all_examples
        with self.db.read() as session:
            others = "others" in asked
            pages = feature_pages(session, self.door, indices, every=every, others=others, examples=examples, parts=asked)
        return [parts.of_page(page, asked) for page in pages]

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


def _jsonl(source: Source) -> Iterator[bytes]:
    for part in source.read():
        yield b"".join(parts.to_json(one) + b"\n" for one in part)


# ---- tables ----


def columns(asked: frozenset[str]) -> list[str]:
    """A table's columns: every number of a feature, and a column for each part asked for."""
    kept = asked | ({"examples", "kept"} if not asked.isdisjoint(parts.OF_EXAMPLES) else set())
    optional = {*parts.PARTS, "kept"}
    return [field.name for field in fields(FeatureParts) if field.name not in optional or field.name in kept]


def _csv(source: Source) -> Iterator[bytes]:
    names = columns(source.query.parts)
    yield _line(names)
    for part in source.read():
        yield b"".join(_line([getattr(one, name) for name in names]) for one in part)


def _line(values: Sequence[Any]) -> bytes:
    return b",".join(map(_field, values)) + b"\r\n"


def _field(value: Any) -> bytes:
    """A cell of a CSV file: nothing where there is nothing, JSON where it is more than one value."""
    if value is None:
        return b""
    if isinstance(value, float):
        return float.__repr__(value).encode()  # numpy's floats have a repr of their own
    if isinstance(value, int):
        return repr(value).encode()
    text = str(cell(value)).encode() if isinstance(value, str) else parts.to_json(value)
    return b'"' + text.replace(b'"', b'""') + b'"'


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
    sink, of_group = _Sink(), WITH_EXAMPLES if "examples" in names else ROWS_OF_A_GROUP
    plain = [field.name for field in schema if not pa.types.is_nested(field.type)]
    # Numbers hardly repeat: with dictionaries the file is larger, and each row group holds 50 kB of memory to the file's end.
    how = {"compression": "zstd", "compression_level": 3, "use_dictionary": False, "write_statistics": plain}
    with pa.parquet.ParquetWriter(pa.PythonFile(sink, "w"), schema, **how) as writer:
        waiting: list[Any] = []
        for part in source.read():
            made = [_array(pa, [getattr(one, name) for one in part], hints[name]) for name in names]
            del part  # or they stay while the next ones are read
            waiting.append(pa.Table.from_arrays(made, schema=schema))
            if sum(map(len, waiting)) >= of_group:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
                yield sink.taken()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
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


def _array(pa: Any, values: Sequence[Any], kind: Any) -> Any:
    """The values as an Arrow array of `_arrow`'s type. What is within them is put one after the other, level by level, and
    handed over as numpy has it: Arrow takes several times as long to find its way through objects, and asks pandas, where it
    is installed, what each of them is, which is another 35 MB."""
    kind, type_ = _present(kind), _arrow(pa, kind)
    there = [one for one in values if one is not None]
    if get_origin(kind) is tuple:
        within = _array(pa, list(chain.from_iterable(there)), get_args(kind)[0])
        return pa.ListArray.from_arrays(_offsets(pa, values), within, type=type_)
    if get_origin(kind) is dict and get_args(kind)[1] is not Any:
        parts_ = (list(chain.from_iterable(held)) for held in (there, map(dict.values, there)))
        keys, items = (_array(pa, held, of) for held, of in zip(parts_, get_args(kind), strict=True))
        return pa.MapArray.from_arrays(_offsets(pa, values), keys, items, type=type_)
    if get_origin(kind) is dict:
        return _texts(pa, [None if one is None else parts.to_json(one).decode() for one in values])
    if pa.types.is_struct(type_):
        hints, gaps = _hints(kind), len(there) < len(values)
        columns = (map(attrgetter(name), there) for name in hints)
        held = ([None if one is None else next(column) for one in values] if gaps else list(column) for column in columns)
        arrays = [_array(pa, one, of) for one, of in zip(held, hints.values(), strict=True)]
        absent = _numbers(pa, [one is None for one in values], bool) if gaps else None
        return pa.StructArray.from_arrays(arrays, fields=list(type_), mask=absent)
    return _texts(pa, values) if kind is str or get_origin(kind) is Literal else _numbers(pa, values, kind)


def _numbers(pa: Any, values: Sequence[Any], kind: type) -> Any:
    validity = _validity(pa, values)
    held = np.array([kind() if one is None else one for one in values] if validity else values, _AS_NUMPY[kind])
    data = np.packbits(held, bitorder="little") if kind is bool else held
    return pa.Array.from_buffers(_arrow(pa, kind), len(values), [validity, pa.py_buffer(data)])


_AS_NUMPY: Mapping[type, type[np.generic]] = {int: np.int64, float: np.float64, bool: np.bool_}


def _texts(pa: Any, values: Sequence[str | None]) -> Any:
    validity = _validity(pa, values)
    encoded = [(one or "").encode() for one in values] if validity else [one.encode() for one in values if one is not None]
    ends = np.fromiter(accumulate(map(len, encoded), initial=0), np.int32, len(values) + 1)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)), validity)


def _validity(pa: Any, values: Sequence[Any]) -> Any:
    """Arrow's bits of which values there are; None where all are."""
    if None not in values:
        return None
    return pa.py_buffer(np.packbits([one is not None for one in values], bitorder="little"))


def _offsets(pa: Any, values: Sequence[Any]) -> Any:
    """Where each value's members begin, and where the last one's end; null for a value that is not there."""
    ends = np.fromiter(accumulate((len(one or ()) for one in values), initial=0), np.int32, len(values) + 1)
    return pa.Array.from_buffers(pa.int32(), len(ends), [_validity(pa, [*values, ()]), pa.py_buffer(ends)])


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
