"""Packed columns: little-endian numpy arrays in bytes, the same on every machine and database."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

F4 = np.dtype("<f4")
I4 = np.dtype("<i4")
ACTS = np.dtype([("pos", "<u2"), ("value", "<f4")])
"""A feature's activation at a position of the row."""
DFA = np.dtype([("src", "<u2"), ("head", "u1"), ("value", "<f4")])
"""What one (source, head) pair gave to the feature at the example's destination."""


def pack(values: NDArray[np.generic], dtype: np.dtype[np.generic]) -> bytes:
    """`values` as bytes of `dtype`, whatever the byte order they came in."""
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def unpack(blob: bytes, dtype: np.dtype[np.generic]) -> NDArray[Any]:
    """The 1-D array that `pack` made; read-only, no copy."""
    return np.frombuffer(blob, dtype=dtype)
