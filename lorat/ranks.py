"""The processes of a run: what one of them has to know of the others. Costs nothing where there is only one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Ranks:
    """`count` processes, of which this is `index`; `device` is its own."""

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self.accelerator, self.device = accelerator, device
        self.count, self.index = accelerator.num_processes, accelerator.process_index

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x`, any shape, over all ranks, on this rank's device."""
        return self.accelerator.reduce(x.to(self.device), "sum") if self.count > 1 else x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on one rank or more; waits for all of them."""
        if self.count == 1:
            return flag
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def max(self, number: int) -> int:
        """The greatest `number` of all ranks."""
        if self.count == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.device)).max().item())

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks, one after the other; the values are pickled between this run's own processes."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)

    def rows(self, table: Tensor) -> Tensor:
        """`table` (n, …) of all ranks in an evaluation, without the rows that only fill up the last batch."""
        return self.accelerator.gather_for_metrics(table)

    def wait(self) -> None:
        """Until every rank is here."""
        self.accelerator.wait_for_everyone()
