"""Packed columns: little-endian numpy arrays in bytes, the same on every machine and database.

An example's activations and DFA are packed closely, since they are most of a database. Numbers are codes of 10 bits, a sign
and a logarithm beside the largest of them, which is there in full (`encode`); places are steps from one to the next, in Rice's
code (`_places`). What rounding takes from a head's entries is added to what that head has left over, so that the sums of the
heads, and with them the identity that pages show, stay what they were. Measured on SmolLM2: LOG.md.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import chain
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sae_core.errors import DamagedRow

P = ParamSpec("P")
R = TypeVar("R")

F4 = np.dtype("<f4")
I4 = np.dtype("<i4")

ERROR = 2 ** (1 / 96) - 1
"""Largest relative error of a packed number: 0.72 %, or `FLOOR` of the largest number beside it where that is more."""
FLOOR = 2.0**-11
_BITS, _LEVELS, _OCTAVE = 10, 511, 48
_POWERS = np.append(0, np.exp2((np.arange(1, _LEVELS + 1) - _LEVELS) / _OCTAVE))
_SHARES: NDArray[np.float64] = np.append(_POWERS, -_POWERS)
"""What each code stands for, as a share of the largest number: from 1 down 10.6 octaves in steps of 1/48 octave; 0 is 0."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]


def pack(values: NDArray[np.generic], dtype: np.dtype[np.generic]) -> bytes:
    """`values` as bytes of `dtype`, whatever the byte order they came in."""
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def unpack(blob: bytes, dtype: np.dtype[np.generic]) -> NDArray[Any]:
    """The 1-D array that `pack` made; read-only, no copy."""
    return np.frombuffer(blob, dtype=dtype)


class Packed(Protocol):
    """The columns of an example that hold its activations and DFA."""

    start: int
    dest: int
    act: float
    acts: bytes
    dfa: bytes


class Found(Protocol):
    """An example that is to be packed, as `sae_core.records.ExampleRecord` has it."""

    @property
    def start(self) -> int: ...
    @property
    def dest(self) -> int: ...
    @property
    def preact(self) -> float: ...
    @property
    def bias(self) -> float: ...
    @property
    def abs_dfa(self) -> float: ...
    @property
    def acts_pos(self) -> NDArray[np.uint16]: ...
    @property
    def acts_value(self) -> NDArray[np.float32]: ...
    @property
    def dfa_src(self) -> NDArray[np.uint16]: ...
    @property
    def dfa_head(self) -> NDArray[np.uint8]: ...
    @property
    def dfa_value(self) -> NDArray[np.float32]: ...
    @property
    def dropped(self) -> NDArray[np.float32]: ...
    @property
    def before(self) -> NDArray[np.float32]: ...


class Acts(NamedTuple):
    """A feature's activations in the window shown, in order of position."""

    pos: Ints
    value: Floats


class Attribution(NamedTuple):
    """An example's DFA: entries by size, largest first, and per head what they leave over. Sums of heads are exact."""

    src: Ints
    head: Ints
    value: Floats
    dropped: Floats
    """[n_heads]: in the window, not among the entries."""
    before: Floats
    """[n_heads]: of sources before the window."""
    preact: float
    """The pre-activation, computed on its own from the hooked z."""
    bias: float
    """c of the affine map."""
    abs_dfa: float
    """Sum of |DFA| over all heads and sources."""

    @property
    def total(self) -> float:
        """Everything together: the pre-activation less the bias."""
        return float(self.value.sum() + self.dropped.sum() + self.before.sum())

    @property
    def gap(self) -> float:
        """|total + bias - preact| / (sum of |DFA| + |bias|), from the numbers as they are stored."""
        size = self.abs_dfa + abs(self.bias)
        return abs(self.total + self.bias - self.preact) / size if size else 0.0


class ManyActs(NamedTuple):
    """Activations of many examples that are to be packed: arrays of one example after the other."""

    start: Ints
    """[n]"""
    dest: Ints
    """[n]"""
    counts: Ints
    """[n]: activations of each, the destination's among them or not."""
    pos: Ints
    """Rising within an example."""
    value: Floats


class ManyDfa(NamedTuple):
    """DFA of many examples that is to be packed: arrays of one example after the other."""

    start: Ints
    """[n]"""
    dest: Ints
    """[n]"""
    counts: Ints
    """[n]: entries of each."""
    src: Ints
    head: Ints
    value: Floats
    dropped: Floats
    """[n, n_heads]"""
    before: Floats
    """[n, n_heads]"""
    preact: Floats
    """[n]"""
    bias: Floats
    """[n]"""
    abs_dfa: Floats
    """[n]"""


class Unpacked(NamedTuple):
    """Many examples read together: arrays of one example after the other, and where each one's part ends."""

    acts_pos: Ints
    acts_value: Floats
    acts_end: Ints
    """[n]: activations other than the destinations', which are the examples' own."""
    src: Ints
    head: Ints
    value: Floats
    end: Ints
    """[n]: entries by size, largest first."""
    dropped: Floats
    before: Floats
    heads_end: Ints
    """[n]: of `dropped` and `before`, an example's heads."""
    preact: Floats
    bias: Floats
    abs_dfa: Floats
    total: Floats
    gap: Floats
    """[n]: as `Attribution` has them."""


# ---- columns of JSON ----


def fold(histogram: dict[str, Any]) -> dict[str, Any]:
    """A histogram {"edges": [n + 1], "counts": [n]} of equal bins with its outer edges only."""
    edges = histogram.get("edges", ())
    return {**histogram, "edges": [edges[0], edges[-1]]} if len(edges) > 2 else histogram


def unfold(histogram: dict[str, Any], *, log: bool) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(edges, counts) of what `fold` left, or of a histogram in full; bins are equal, in `log` if all edges are above 0."""
    edges, counts = histogram.get("edges", ()), histogram.get("counts", ())
    log = log and histogram.get("spacing") != "equal" and min(edges, default=0) > 0
    if len(edges) == 2 and len(counts) > 1:
        low, high = map(math.log, edges) if log else edges
        between = [low + (high - low) * i / len(counts) for i in range(len(counts) + 1)]
        edges = [float(f"{edge:.6g}") for edge in (map(math.exp, between) if log else between)]
    return tuple(edges), tuple(counts)


def shorten(value: Any) -> Any:
    """JSON with its numbers in seven digits, which is all that float32 has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: shorten(part) for name, part in value.items()}
    return [shorten(part) for part in value] if isinstance(value, (list, tuple)) else value


_KNOWN = (
    b'"positional":0.1,"next":0.9,"next_follows":0.5,"next_bands":0.2,"next_logit":1.5'
    b'[{"family":"induction","score":0.9,"examples":[[0,0],[0,1],[0,2],[0,3]]},{"family":"previous token","score":'
    b'"duplicate token""local context""long-range context""suppression"{}[]'
    b'{"tokens":131072,"pairs":[[{"edges":[-3.1,3.2],"counts":[1,0,0,1,1,2,3,'
    b"[[1,1,0,512,0.0],[2,3,0,1024,0.0],[4,7,0,2048,0.0],[8,15,0,4096,0.0],[16,31,0,8192,0.0],[32,63,0,16384,0.0],"
    b"[64,127,0,32768,0.0],[128,255,0,65536,0.0]]"
    b'[{"low":0.5946036,"high":0.7071068,"count":0},{"low":0.8408964,"high":1.189207,"count":1},{"low":1.414214,"high":'
    b'{"n":40,"distance":[[0,1,0.1],[1,2,0.1],[2,4,0.1],[4,8,0.1],[8,16,0.1],[16,32,0.1],[32,64,0.1],[64,128,0.1]],'
    b'"start_share":0.1,"heads":6.2,"sources":10.1}'
    b'{"examples":16,"row_start":0.1,"induction":0.1,"induction_chance":0.00,"previous":0.0,"current":0.0,"duplicate":0.0,'
    b'"duplicate_chance":0.00,"near":0.7,"far":0.0,"distance":8.3,"top_share":0.5,"source_logit":-1.6}'
)
"""What the columns say again and again, which need not be stored with each. It never changes: what was written with it is
read with it."""


def deflate(text: str) -> bytes:
    """`text` compressed, without zlib's header."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_KNOWN)
    return packer.compress(text.encode()) + packer.flush()


def inflate(data: bytes) -> str:
    """The text that `deflate` compressed, before `_KNOWN` was there too."""
    return zlib.decompressobj(-15, zdict=_KNOWN).decompress(data).decode()


# ---- activations ----


_ACTS = np.dtype([("n", "<u2"), ("top", "<f4"), ("low_bits", "u1")])


def pack_acts(examples: Sequence[Found]) -> list[bytes]:
    """The `acts` column of each: activations other than the destination's, which is `act`; empty where there is no other."""
    counts = np.array([len(e.acts_pos) for e in examples], np.int64)
    pos = np.concatenate([*(e.acts_pos for e in examples), np.zeros(0, np.uint16)]).astype(np.int64)
    value = np.concatenate([*(e.acts_value for e in examples), np.zeros(0, np.float32)]).astype(np.float64)
    return pack_many_acts(ManyActs(_per(examples, "start"), _per(examples, "dest"), counts, pos, value))


def pack_many_acts(many: ManyActs) -> list[bytes]:
    """`pack_acts` of examples that are arrays already: the same bytes."""
    size = len(many.counts)
    group = np.repeat(np.arange(size), many.counts)
    others = many.pos != many.dest[group]
    pos, value, group = (many.pos - many.start[group])[others], many.value[others], group[others]
    header = np.zeros(size, _ACTS)
    header["n"] = np.bincount(group, minlength=size)
    header["top"] = _largest(value, group, size)
    places, header["low_bits"] = _places(pos, group, size)
    packed = _packed(
        header, [*places, _coded(encode(value, header["top"].astype(np.float64)[group]), header["n"].astype(np.int64))]
    )
    return [blob if n else b"" for blob, n in zip(packed, header["n"].tolist(), strict=True)]


def _whole(read: Callable[P, R]) -> Callable[P, R]:
    """What packed bytes give, or DamagedRow: a disk that rots is not a fault of ours, and has a remedy."""

    @wraps(read)
    def reads(*given: P.args, **named: P.kwargs) -> R:
        try:
            return read(*given, **named)
        except (ValueError, IndexError, OverflowError, MemoryError, FloatingPointError) as error:
            raise DamagedRow(
                "What is stored of these examples is damaged: it does not unpack. Harvest the SAE again, or restore a backup."
            ) from error

    return reads


@_whole
def read_acts(example: Packed) -> Acts:
    """What `pack_acts` holds."""
    found = read_examples([example])
    pos = np.append(found.acts_pos, example.dest)
    order = np.argsort(pos, kind="stable")
    return Acts(pos[order], np.append(found.acts_value, example.act)[order])


# ---- DFA ----


_DFA = np.dtype(
    [
        ("n_heads", "u1"), ("before", "u1"), ("low_bits", "u1"), ("n", "<u2"), ("top", "<f4"), ("rest", "<f4"),
        ("preact", "<f4"), ("bias", "<f4"), ("abs_dfa", "<f4"),
    ]
)  # fmt: skip


def pack_dfa(examples: Sequence[Found]) -> list[bytes]:
    """The `dfa` column of each: entries, what each head has beside them, pre-activation, bias, and the sum of |DFA|."""
    counts = np.array([len(e.dfa_value) for e in examples], np.int64)
    src, head, value = (np.concatenate([getattr(e, name) for e in examples]) for name in ("dfa_src", "dfa_head", "dfa_value"))
    dropped, before = (np.array([getattr(e, name) for e in examples], np.float64) for name in ("dropped", "before"))
    sums = (np.array([getattr(e, name) for e in examples], np.float64) for name in ("preact", "bias", "abs_dfa"))
    return pack_many_dfa(
        ManyDfa(
            _per(examples, "start"), _per(examples, "dest"), counts, src.astype(np.int64), head.astype(np.int64),
            value.astype(np.float64), dropped, before, *sums,
        )
    )  # fmt: skip


def pack_many_dfa(many: ManyDfa) -> list[bytes]:
    """`pack_dfa` of examples that are arrays already: the same bytes."""
    counts, start, head, value = many.counts, many.start, many.head, many.value
    size = len(counts)
    group = np.repeat(np.arange(size), counts)
    left = np.stack([many.dropped, many.before], 1)  # [size, 2, n_heads]
    n_heads = left.shape[2]

    place = head * (many.dest - start + 1)[group] + many.src - start[group]
    order = np.argsort(group * (place.max(initial=0) + 1) + place, kind="stable")
    head, value, place = head[order], value[order], place[order]
    at_head = group * n_heads + head
    # What rounding can add to a head's rest must not lift it above the largest number, beyond which there is no code.
    spare = (ERROR + FLOOR) * np.bincount(at_head, np.abs(value), minlength=size * n_heads).reshape(size, n_heads)
    header = np.zeros(size, _DFA)
    header["preact"], header["bias"], header["abs_dfa"] = many.preact, many.bias, many.abs_dfa
    header["top"] = np.maximum(
        _largest(value, group, size), (np.abs(left) + np.stack([spare, np.zeros_like(spare)], 1)).max((1, 2), initial=0)
    )
    top = np.nextafter(header["top"], np.float32(np.inf)).astype(np.float64)
    header["top"] = top

    entries = encode(value, top[group])
    rounded = np.bincount(at_head, value - decode(entries, top[group]), minlength=size * n_heads)
    left[:, 0] += rounded.reshape(size, n_heads)
    rests = encode(left, top[:, None, None])
    header["rest"] = (left - decode(rests, top[:, None, None])).sum((1, 2))
    header["n_heads"], header["n"] = n_heads, counts
    header["before"] = rests[:, 1].any(1)

    places, header["low_bits"] = _places(place, group, size)
    kept = np.repeat(np.stack([np.ones(size, bool), header["before"] > 0], 1), n_heads, axis=1)  # [size, 2 n_heads]
    return _packed(header, [*places, _coded(rests.reshape(size, -1)[kept], kept.sum(1)), _coded(entries, counts)])


@_whole
def read_dfa(example: Packed) -> Attribution:
    """What `pack_dfa` holds."""
    found = read_examples([example])
    sums = (float(found.preact[0]), float(found.bias[0]), float(found.abs_dfa[0]))
    return Attribution(found.src, found.head, found.value, found.dropped, found.before, *sums)


@_whole
def read_examples(examples: Sequence[Packed]) -> Unpacked:
    """What `pack_acts` and `pack_dfa` hold of all `examples`: as quick for twenty as for two, since numpy takes its time by the
    call."""
    size = len(examples)
    dfas, acts = [e.dfa for e in examples], [e.acts for e in examples]
    of_dfa = np.frombuffer(b"".join([blob[: _DFA.itemsize] or _NO_DFA for blob in dfas]), _DFA)
    of_acts = np.frombuffer(b"".join([blob[: _ACTS.itemsize] or _NO_ACTS for blob in acts]), _ACTS)
    parts = [*(blob[_DFA.itemsize :] for blob in dfas), *(blob[_ACTS.itemsize :] for blob in acts)]
    lengths = np.array([len(part) for part in parts], np.int64)
    data = np.frombuffer(b"".join([*parts, b"\0\0\0"]), np.uint8)

    def both(name: str) -> Ints:
        return np.concatenate([of_dfa[name], of_acts[name]]).astype(np.int64)

    n, low_bits, n_heads = both("n"), both("low_bits"), of_dfa["n_heads"].astype(np.int64)
    n_rests = n_heads * (1 + of_dfa["before"])
    place, at = _read_places(data, 8 * (np.cumsum(lengths) - lengths), n, low_bits)
    n_codes = n.copy()
    n_codes[:size] += n_rests
    top = np.concatenate([of_dfa["top"], of_acts["top"]]).astype(np.float64)
    numbers = decode(_read_bits(data, at, n_codes, np.full(2 * size, _BITS)), np.repeat(top, n_codes))

    n_dfa, n_acts = n[:size], n[size:]
    of_dest, start = (np.array([getattr(e, name) for e in examples], np.int64) for name in ("dest", "start"))
    whose = np.repeat(np.arange(size), n_dfa)
    among = _within(n_codes[:size])
    is_rest = among < np.repeat(n_rests, n_codes[:size])
    values = numbers[: len(among)]
    rests, value = values[is_rest], values[~is_rest]
    is_dropped = among[is_rest] < np.repeat(n_heads, n_rests)
    dropped, before = rests[is_dropped], np.zeros(int(n_heads.sum()))
    before[np.repeat(of_dfa["before"] > 0, n_heads)] = rests[~is_dropped]
    # What rounding left over stands with the largest of the heads' rests, the first of several.
    of_head = np.repeat(np.arange(size), n_heads)
    largest = np.lexsort((-np.abs(dropped), of_head))[(np.cumsum(n_heads) - n_heads)[n_heads > 0]]
    dropped[largest] += of_dfa["rest"][n_heads > 0]

    head, src = np.divmod(place[: len(whose)], (of_dest - start + 1)[whose])
    order = np.lexsort((-np.abs(value), whose))
    preact, bias, abs_dfa = (of_dfa[name].astype(np.float64) for name in ("preact", "bias", "abs_dfa"))
    total = (np.bincount(whose, value, size) + np.bincount(of_head, dropped + before, size)).astype(np.float64)
    scale = abs_dfa + np.abs(bias)
    return Unpacked(
        acts_pos=place[len(whose) :] + np.repeat(start, n_acts),
        acts_value=numbers[len(among) :],
        acts_end=np.cumsum(n_acts),
        src=(src + start[whose])[order],
        head=head[order],
        value=value[order],
        end=np.cumsum(n_dfa),
        dropped=dropped,
        before=before,
        heads_end=np.cumsum(n_heads),
        preact=preact,
        bias=bias,
        abs_dfa=abs_dfa,
        total=total,
        gap=np.abs(total + bias - preact) / np.where(scale > 0, scale, 1),
    )


_NO_ACTS, _NO_DFA = bytes(_ACTS.itemsize), bytes(_DFA.itemsize)


def _per(examples: Sequence[Found], name: str) -> Ints:
    return np.array([getattr(e, name) for e in examples], np.int64)


def _largest(value: Floats, group: Ints, size: int) -> Floats:
    found = np.zeros(size)
    np.maximum.at(found, group, np.abs(value))
    return found


# ---- numbers as codes ----


def encode(value: Floats, top: Floats) -> Ints:
    """Codes 0 .. 1023 of values that are at most `top` in size: a sign and 9 bits of log2(|value| / top)."""
    share = np.abs(value) / np.where(top > 0, top, 1)
    seen = share >= _POWERS[1] / 2  # what is smaller than half the lowest level is nearer to 0
    level = np.clip(np.rint(_OCTAVE * np.log2(np.where(seen, share, 1))) + _LEVELS, 1, _LEVELS).astype(np.int64)
    return np.where(seen, level + np.where(value < 0, _LEVELS + 1, 0), 0)


def decode(codes: Ints, top: Floats | float) -> Floats:
    """The values of codes, float64."""
    return np.asarray(_SHARES[codes] * top)


def _coded(codes: Ints, counts: Ints) -> "Field":
    """`counts` [size] of the codes belong to each example."""
    return _bits(codes)[:, -_BITS:].ravel(), _BITS * counts


# ---- reading bits ----


def _within(counts: Ints) -> Ints:
    """0, 1, 2 ... of each group in turn."""
    found: Ints = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return found


def _read_bits(data: Bytes, begin: Ints, counts: Ints, widths: Ints) -> Ints:
    """Of each group `counts` numbers of `widths` bits, 0 to 17, which stand one after another from bit `begin` on. Three bytes
    more must follow `data`'s last bit."""
    width = np.repeat(widths, counts)
    at = np.repeat(begin, counts) + _within(counts) * width
    three = (data[:-2].astype(np.int64) << 16) | (data[1:-1].astype(np.int64) << 8) | data[2:]
    found: Ints = (three[at >> 3] >> (24 - (at & 7) - width)) & ((1 << width) - 1)
    return found


# ---- places as steps, and bits ----

Field = tuple[Bytes, Ints]
"""Bits, of one example after the other, and how many are each example's."""


def _bits(numbers: Ints) -> Bytes:
    """[n, 16]: numbers below 2^16 in binary, the highest digit first."""
    return np.unpackbits(numbers.astype(">u2").view(np.uint8)).reshape(-1, 16)


def _places(place: Ints, group: Ints, size: int) -> tuple[list[Field], Ints]:
    """Ascending places of each group as steps in Rice's code, and the low bits of a step that each group writes plainly.

    A step is how many places were passed over. Its high part is as many ones and a zero, all of a group's steps one after
    another; then come their low parts. With the low bits about log2(0.69 x mean step) that is within a few percent of the
    entropy of places drawn at random (R. F. Rice, 1979).
    """
    previous = np.append(-1, place[:-1])[: len(place)]
    previous[np.append(True, group[1:] != group[:-1])[: len(place)]] = -1
    step = place - previous - 1
    counts = np.bincount(group, minlength=size)
    mean = np.bincount(group, step, minlength=size) / np.maximum(counts, 1)
    low_bits = np.clip(np.rint(np.log2(np.maximum(0.69 * (mean + 0.5), 1))), 0, 15).astype(np.int64)
    low = low_bits[group]
    high = step >> low
    unary = np.ones(int((high + 1).sum()), np.uint8)
    unary[np.cumsum(high + 1) - 1] = 0
    some = np.flatnonzero(low)  # places that stand close have no low bits
    rest = _bits(step[some] & ((1 << low[some]) - 1))[np.arange(16) >= 16 - low[some, None]]
    return [(unary, np.bincount(group, high + 1, minlength=size).astype(np.int64)), (rest, low_bits * counts)], low_bits


def _read_places(data: Bytes, begin: Ints, counts: Ints, low_bits: Ints) -> tuple[Ints, Ints]:
    """The places of each group, which begins at bit `begin`, and where the bits after them begin."""
    if not counts.any():
        return np.zeros(0, np.int64), begin
    zeros = np.flatnonzero(np.unpackbits(data) == 0)
    among, last = _within(counts), np.cumsum(counts)
    ends = zeros[np.repeat(np.searchsorted(zeros, begin), counts) + among]
    previous = np.append(0, ends[:-1])
    previous[among == 0] = (begin - 1)[counts > 0]
    rest = begin.copy()
    rest[counts > 0] = ends[last[counts > 0] - 1] + 1
    low = np.repeat(low_bits, counts)
    step = ((ends - previous - 1) << low) + _read_bits(data, rest, counts, low_bits) + 1
    sums = np.cumsum(step)
    earlier = np.append(0, sums)[last - counts]
    return sums - np.repeat(earlier, counts) - 1, rest + counts * low_bits


def _packed(header: NDArray[np.void], fields: Sequence[Field]) -> list[bytes]:
    """Each example's header, then its bits of the first field, of the second ..., filled up to whole bytes."""
    used: Ints = np.sum([counts for _, counts in fields], axis=0)
    filler = (np.zeros(8 * len(header), np.uint8), -used % 8)
    # Bytes, one for each bit, are cut and joined several times quicker than arrays.
    runs = [_sliced(*field) for field in (*fields, filler)]
    bits = np.packbits(np.frombuffer(b"".join(chain.from_iterable(zip(*runs, strict=True))), np.uint8))
    heads = _sliced(header.view(np.uint8), np.full(len(header), header.dtype.itemsize))
    return [head + body for head, body in zip(heads, _sliced(bits, (used + 7) // 8), strict=True)]


def _sliced(data: Bytes, sizes: Ints) -> list[bytes]:
    """`data` cut into runs of these sizes."""
    whole, ends = data.tobytes(), np.cumsum(sizes).tolist()
    return [whole[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
