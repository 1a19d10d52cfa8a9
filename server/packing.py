"""Packed columns: little-endian numpy arrays in bytes, the same on every machine and database.

An example's activations and DFA are packed closely, since they are most of a database. Each column begins with one number
in full and holds the others as codes of 12 bits, a sign and a logarithm (`encode`), and positions as steps of 4 bits
(`steps`). What rounding takes from a head's entries is added to what that head has left over, so that the sums of the heads,
and with them the identity that pages show, stay what they were. Measured on SmolLM2: LOG.md.

Harvests written before have plain columns: `acts` as ACTS, `dfa` as DFA, `dropped` and `before` as F4. They are told apart
by `dropped`, which is never empty there and always empty now. `read_acts` and `read_dfa` read both.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

F4 = np.dtype("<f4")
I4 = np.dtype("<i4")
ACTS = np.dtype([("pos", "<u2"), ("value", "<f4")])
"""A feature's activation at a position of the row."""
DFA = np.dtype([("src", "<u2"), ("head", "u1"), ("value", "<f4")])
"""What one (source, head) pair gave to the feature at the example's destination."""

ERROR = 2 ** (1 / 256) - 1
"""Largest relative error of a packed number: 0.27 %, or `FLOOR` of the largest number beside it where that is more."""
FLOOR = 2.0**-16
_LEVELS = 2047
_POWERS = np.append(0, np.exp2((np.arange(1, _LEVELS + 1) - _LEVELS) / 128))
_SHARES: NDArray[np.float64] = np.append(_POWERS, -_POWERS)
"""What each code stands for, as a share of the largest number: from 1 down 16 octaves in steps of 1/128 octave; 0 is 0."""
_SKIP = 15

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
    dropped: bytes
    before: bytes


class Found(Protocol):
    """An example that is to be packed, as `sae_core.records.ExampleRecord` has it."""

    @property
    def start(self) -> int: ...
    @property
    def dest(self) -> int: ...
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

    @property
    def total(self) -> float:
        """Everything together: the pre-activation less the bias."""
        return float(self.value.sum() + self.dropped.sum() + self.before.sum())


# ---- columns of JSON ----


def fold(histogram: dict[str, Any]) -> dict[str, Any]:
    """A histogram {"edges": [n + 1], "counts": [n]} of equal bins with its outer edges only."""
    edges = histogram.get("edges", ())
    return {**histogram, "edges": [edges[0], edges[-1]]} if len(edges) > 2 else histogram


def unfold(histogram: dict[str, Any], *, log: bool) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(edges, counts) of what `fold` left, or of a histogram in full; bins are equal, or equal in `log`."""
    edges, counts = histogram.get("edges", ()), histogram.get("counts", ())
    if len(edges) == 2 and len(counts) > 1:
        low, high = np.log(edges) if log else np.array(edges)
        between = np.linspace(low, high, len(counts) + 1)
        edges = [float(f"{edge:.6g}") for edge in (np.exp(between) if log else between)]
    return tuple(edges), tuple(counts)


def shorten(value: Any) -> Any:
    """JSON with its numbers in seven digits, which is all that float32 has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: shorten(part) for name, part in value.items()}
    return [shorten(part) for part in value] if isinstance(value, (list, tuple)) else value


def deflate(text: str) -> bytes:
    """`text` compressed, without zlib's header."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(text.encode()) + packer.flush()


def inflate(data: bytes) -> str:
    """The text that `deflate` compressed."""
    return zlib.decompress(data, -15).decode()


# ---- activations ----


_ACTS = np.dtype([("n", "<u2"), ("top", "<f4")])


def pack_acts(examples: Sequence[Found]) -> list[bytes]:
    """The `acts` column of each: activations other than the destination's, which is `act`; empty where there is no other."""
    counts = np.array([len(e.acts_pos) for e in examples], np.int64)
    group = np.repeat(np.arange(len(examples)), counts)
    pos = np.concatenate([*(e.acts_pos for e in examples), np.zeros(0, np.uint16)]).astype(np.int64)
    value = np.concatenate([*(e.acts_value for e in examples), np.zeros(0, np.float32)]).astype(np.float64)
    others = pos != _per(examples, "dest")[group]
    pos, value, group = (pos - _per(examples, "start")[group])[others], value[others], group[others]
    counts = np.bincount(group, minlength=len(examples))
    head = np.zeros(len(examples), _ACTS)
    head["n"], head["top"] = counts, _largest(value, group, len(examples))
    parts = (
        _sliced(head.view(np.uint8), np.full(len(examples), _ACTS.itemsize)),
        _halves(encode(value, head["top"].astype(np.float64)[group]), counts),
        _steps(pos, group, len(examples)),
    )
    return [b"".join(found) if n else b"" for n, *found in zip(counts.tolist(), *parts, strict=True)]


def read_acts(example: Packed) -> Acts:
    """What `pack_acts`, or the plain layout, holds."""
    if example.dropped:
        plain = unpack(example.acts, ACTS)
        return Acts(plain["pos"].astype(np.int64), plain["value"].astype(np.float64))
    pos, value = np.array([example.dest]), np.array([example.act])
    if example.acts:
        head = np.frombuffer(example.acts, _ACTS, 1)[0]
        codes, rest = _read_halves(example.acts, _ACTS.itemsize, int(head["n"]))
        others = example.start + _read_steps(example.acts, rest)
        order = np.argsort(np.append(pos, others), kind="stable")
        pos = np.append(pos, others)[order]
        value = np.append(value, decode(codes, float(head["top"])))[order]
    return Acts(pos, value)


# ---- DFA ----


_DFA = np.dtype([("n_heads", "u1"), ("before", "u1"), ("n", "<u2"), ("top", "<f4"), ("rest", "<f4")])


def pack_dfa(examples: Sequence[Found]) -> list[bytes]:
    """The `dfa` column of each, which also holds what the plain layout has in `dropped` and `before`."""
    size = len(examples)
    counts = np.array([len(e.dfa_value) for e in examples], np.int64)
    group = np.repeat(np.arange(size), counts)
    joined = [np.concatenate([getattr(e, name) for e in examples]) for name in ("dfa_src", "dfa_head", "dfa_value")]
    src, head, value = joined[0].astype(np.int64), joined[1].astype(np.int64), joined[2].astype(np.float64)
    left = np.array([[e.dropped, e.before] for e in examples], np.float64)  # [size, 2, n_heads]
    n_heads = left.shape[2]

    start = _per(examples, "start")
    place = head * (_per(examples, "dest") - start + 1)[group] + src - start[group]
    order = np.argsort(group * (place.max(initial=0) + 1) + place, kind="stable")
    head, value, place = head[order], value[order], place[order]
    at_head = group * n_heads + head
    # What rounding can add to a head's rest must not lift it above the largest number, beyond which there is no code.
    spare = ERROR * np.bincount(at_head, np.abs(value), minlength=size * n_heads).reshape(size, n_heads)
    header = np.zeros(size, _DFA)
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

    n_rests = n_heads * (1 + header["before"].astype(np.int64))
    codes = np.empty(int(n_rests.sum() + counts.sum()), np.int64)
    mine = np.repeat(np.arange(size), n_rests + counts)
    at = np.arange(len(codes)) - np.repeat(np.cumsum(n_rests + counts) - n_rests - counts, n_rests + counts)
    is_rest = at < n_rests[mine]
    codes[is_rest] = rests.reshape(size, -1)[mine[is_rest], at[is_rest]]
    codes[~is_rest] = entries
    parts = (
        _sliced(header.view(np.uint8), np.full(size, _DFA.itemsize)),
        _halves(codes, n_rests + counts),
        _steps(place, group, size),
    )
    return [b"".join(found) for found in zip(*parts, strict=True)]


def read_dfa(example: Packed) -> Attribution:
    """What `pack_dfa`, or the plain layout, holds."""
    if example.dropped:
        plain = unpack(example.dfa, DFA)
        rests = (unpack(blob, F4).astype(np.float64) for blob in (example.dropped, example.before))
        return Attribution(
            plain["src"].astype(np.int64), plain["head"].astype(np.int64), plain["value"].astype(np.float64), *rests
        )
    header = np.frombuffer(example.dfa, _DFA, 1)[0]
    n_heads, top = int(header["n_heads"]), float(header["top"])
    n_rests = n_heads * (1 + int(header["before"]))
    codes, rest = _read_halves(example.dfa, _DFA.itemsize, n_rests + int(header["n"]))
    values = decode(codes, top)
    dropped, value = values[:n_heads], values[n_rests:]
    before = values[n_heads:n_rests] if n_rests > n_heads else np.zeros(n_heads)
    dropped[np.abs(dropped).argmax()] += float(header["rest"])
    head, src = np.divmod(_read_steps(example.dfa, rest), example.dest - example.start + 1)
    order = np.argsort(-np.abs(value), kind="stable")
    return Attribution(src[order] + example.start, head[order], value[order], dropped, before)


def _per(examples: Sequence[Found], name: str) -> Ints:
    return np.array([getattr(e, name) for e in examples], np.int64)


def _largest(value: Floats, group: Ints, size: int) -> Floats:
    found = np.zeros(size)
    np.maximum.at(found, group, np.abs(value))
    return found


# ---- numbers as 12 bits ----


def encode(value: Floats, top: Floats) -> Ints:
    """Codes 0 .. 4095 of values that are at most `top` in size: a sign and 11 bits of log2(|value| / top)."""
    share = np.abs(value) / np.where(top > 0, top, 1)
    seen = share >= _POWERS[1] / 2  # what is smaller than half the lowest level is nearer to 0
    level = np.clip(np.rint(128 * np.log2(np.where(seen, share, 1))) + _LEVELS, 1, _LEVELS).astype(np.int64)
    return np.where(seen, level + np.where(value < 0, _LEVELS + 1, 0), 0)


def decode(codes: Ints, top: Floats | float) -> Floats:
    """The values of codes, float64."""
    return np.asarray(_SHARES[codes] * top)


def _halves(codes: Ints, counts: Ints) -> list[bytes]:
    """The codes of each group in 12 bits, two in three bytes; an odd group ends in a code of 0."""
    pairs = _padded(codes, counts, 2, 0).reshape(-1, 2)
    a, b = pairs[:, 0], pairs[:, 1]
    return _sliced(np.stack([a & 255, a >> 8 | (b & 15) << 4, b >> 4], 1).astype(np.uint8).ravel(), (counts + 1) // 2 * 3)


def _read_halves(blob: bytes, offset: int, n: int) -> tuple[Ints, int]:
    """The codes that begin at `offset`, and where they end."""
    size = (n + 1) // 2 * 3
    raw = np.frombuffer(blob, np.uint8, size, offset).astype(np.int64)
    codes, middle = np.empty(size // 3 * 2, np.int64), raw[1::3]
    codes[0::2], codes[1::2] = raw[0::3] | (middle & 15) << 8, middle >> 4 | raw[2::3] << 4
    return codes[:n], offset + size


# ---- positions as steps of 4 bits ----


def _steps(place: Ints, group: Ints, size: int) -> list[bytes]:
    """Ascending places of each group: s < 15 is a place s + 1 after the last one, 15 leaves 15 out and marks none."""
    previous = np.append(-1, place[:-1]) if len(place) else place
    previous[np.append(True, group[1:] != group[:-1])[: len(place)]] = -1
    skips, last = np.divmod(place - previous - 1, _SKIP)
    steps = np.full(int((skips + 1).sum()), _SKIP)
    steps[np.cumsum(skips + 1) - 1] = last
    counts = np.bincount(group, skips + 1, minlength=size).astype(np.int64)
    pairs = _padded(steps, counts, 2, _SKIP).reshape(-1, 2)
    return _sliced((pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8), (counts + 1) // 2)


def _read_steps(blob: bytes, offset: int) -> Ints:
    raw = np.frombuffer(blob, np.uint8, offset=offset)
    steps = np.empty(2 * len(raw), np.int64)
    steps[0::2], steps[1::2] = raw & 15, raw >> 4
    marks = steps != _SKIP
    places = np.cumsum(steps + marks) - 1
    found: Ints = places[marks]
    return found


def _padded(values: Ints, counts: Ints, to: int, filler: int) -> Ints:
    """Groups one after another, each filled up to a multiple of `to`."""
    room = (counts + to - 1) // to * to
    filled = np.full(int(room.sum()), filler, np.int64)
    filled[np.arange(len(values)) + np.repeat(np.cumsum(room - counts) - (room - counts), counts)] = values
    return filled


def _sliced(data: Bytes, sizes: Ints) -> list[bytes]:
    """`data` cut into runs of these sizes."""
    whole, ends = data.tobytes(), np.cumsum(sizes).tolist()
    return [whole[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
