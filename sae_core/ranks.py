"""The processes that train together: each on its part of every batch, or each on SAEs of its own. Alone, nothing is exchanged.

A run must not notice how many they are. What is decided once (a precision, where a pool begins, which features are dead) is
decided alike by all, from sums over ranks or by rank 0; what is written is written by rank 0, or by the one rank that owns
a run. `parallel.py` starts them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed

T = TypeVar("T")


class Stopped(Exception):
    """This rank was told to stop; what is needed to go on has been saved."""


class RankLost(Exception):
    """Another rank is gone, so nothing can be exchanged any more. What is in memory may be half of a step: not to be saved."""


def _never() -> bool:
    return False


class Ranks:
    """One process of `size`; its number is `rank`. Whatever is exchanged comes out the same on every rank, bit for bit.

    `told` says whether this process was told to stop. `control` is a group that talks on the CPU, for what is no tensor of
    the device: a GPU is then not waited for. Every exchange raises RankLost when another rank is gone.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        told: Callable[[], bool] = _never,
        control: "distributed.ProcessGroup | None" = None,
    ) -> None:
        self.rank, self.size, self._told, self._control = rank, size, told, control

    def alone(self) -> "Ranks":
        """This process by itself, for work that it does not share; told to stop by the same voice."""
        return Ranks(told=self._told)

    # ---- tensors of the device ----

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            with _together():
                distributed.all_reduce(values)
        return values

    def same(self, values: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        if self.size > 1:
            with _together():
                distributed.broadcast(values, 0)
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's 1-D `values`, of whatever lengths, in order of rank."""
        if self.size == 1:
            return [values]
        mine = torch.zeros(self.size, dtype=torch.int64)
        mine[self.rank] = len(values)
        lengths = self._add(mine).tolist()
        padded = [values.new_empty(max(lengths)) for _ in lengths]
        with _together():
            distributed.all_gather(padded, torch.cat([values, values.new_zeros(max(lengths) - len(values))]))
        return [part[:length] for part, length in zip(padded, lengths, strict=True)]

    # ---- numbers and agreements ----

    def count(self, n: int) -> int:
        """The sum of a whole number over ranks."""
        return n if self.size == 1 else int(self._add(torch.tensor(n)))

    def share(self, value: Callable[[], T]) -> T:
        """What `value` gives on rank 0, which alone calls it. When that raises, the others see a lost rank."""
        if self.size == 1:
            return value()
        said: list[T | None] = [value() if self.rank == 0 else None]
        with _together():
            distributed.broadcast_object_list(said, 0, group=self._control)
        return cast(T, said[0])

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` gives: first on rank 0, which leaves on disk what must be there, then on the others, which find it."""
        if self.rank == 0:
            made = make()
            self.wait()
            return made
        self.wait()
        return make()

    def stop(self) -> bool:
        """Whether any rank was told to stop: the same answer for all, so that all stop after the same step."""
        return self._told() if self.size == 1 else bool(self._add(torch.tensor(int(self._told()))))

    def check(self) -> None:
        """Raise Stopped when this process was told to; where ranks work apart and each may stop by itself."""
        if self._told():
            raise Stopped

    def wait(self) -> None:
        """Until every rank is here."""
        self.count(0)

    def _add(self, numbers: Tensor) -> Tensor:
        with _together():
            distributed.all_reduce(numbers, group=self._control)
        return numbers

    # ---- who does what ----

    def part(self, n: int) -> slice:
        """This rank's part of n things: neighbours, as even as can be."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def mine(self, index: int) -> bool:
        """Whether one of many things, by its number, is this rank's."""
        return index % self.size == self.rank


ALONE = Ranks()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's errors are plain or their own RuntimeErrors
        raise RankLost(f"Another process of this run is gone ({error}).") from error
