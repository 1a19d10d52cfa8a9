"""What entered the layers' blocks when the rows were swept, kept on disk for the visit: with it the attention of a row costs
what one attention costs, instead of a second pass through all blocks before it.

It is 4 d_model bytes a token and layer, so only harvests of moderate size keep it (`HarvestConfig.keeps_streams`).
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """A folder with one file for each layer and shard: fp32 [rows of the shard, context, d_model]."""

    folder: Path
    layers: Sequence[int]
    shard_rows: int
    context: int
    d_model: int

    def path(self, layer: int, first_row: int) -> Path:
        """The file of the shard that begins with `first_row`."""
        return self.folder / f"stream-{layer:03d}-{first_row:08d}.f32"

    def read(self, layers: Sequence[int], rows: NDArray[np.int32]) -> dict[int, Tensor] | None:
        """By layer, the streams [b, context, d_model] of ascending rows [b]; None where any is not there."""
        shards = rows // self.shard_rows * self.shard_rows
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for first in np.unique(shards).tolist():
            which = rows[shards == first] - first
            for layer, parts in found.items():
                if not self.path(layer, first).exists():
                    return None
                shard = np.memmap(self.path(layer, first), dtype=np.float32, mode="r")
                parts.append(torch.from_numpy(shard.reshape(-1, self.context, self.d_model)[which]))
        return {layer: torch.cat(parts) for layer, parts in found.items()}


class StreamWriter:
    """Writes a shard's files aside, batch after batch; `finish` gives them their names, so a file that is there is whole."""

    def __init__(self, streams: Streams, shard: range) -> None:
        self.streams, self.shard = streams, shard
        streams.folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own: a worker that was thought dead may be writing the same shard.
        self.aside = Path(tempfile.mkdtemp(prefix="streams-", suffix=".aside", dir=streams.folder))
        # Written, not mapped: a full disk is then an error that can be told, where a map would end the process.
        self.files = {layer: (self.aside / str(layer)).open("wb") for layer in streams.layers}

    def take_in(self, streams: Mapping[int, Tensor]) -> None:
        """Streams [b, context, d_model] of the next rows, by layer."""
        for layer, file in self.files.items():
            file.write(streams[layer].float().cpu().contiguous().numpy().data)

    def finish(self) -> None:
        """Everything has been taken in."""
        for layer, file in self.files.items():
            file.close()
            (self.aside / str(layer)).rename(self.streams.path(layer, self.shard.start))
        self.close()

    def close(self) -> None:
        """What was not finished goes."""
        for file in self.files.values():
            file.close()
        shutil.rmtree(self.aside, ignore_errors=True)
