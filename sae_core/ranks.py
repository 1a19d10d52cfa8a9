"""The processes that train one SAE together, each on its part of every batch; alone, nothing is exchanged."""

from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T", bound=Tensor)


class Ranks:
    """One process of `size`; its number is `rank`. What it gives back is the same on every rank."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """All ranks' 1-D `values`, of whatever lengths, one after the other."""
        if self.size == 1:
            return values
        lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(values)], device=values.device))
        longest = max(int(length) for length in lengths)
        padded = [values.new_empty(longest) for _ in range(self.size)]
        mine = values.new_zeros(longest)
        mine[: len(values)] = values
        distributed.all_gather(padded, mine)
        return torch.cat([part[: int(length)] for part, length in zip(padded, lengths, strict=True)])

    def part(self, n: int) -> slice:
        """This rank's part of n things."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            distributed.barrier()


ALONE = Ranks()
