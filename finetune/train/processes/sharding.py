"""The optimizer's state split over processes: ZeRO stage 1, "P_os" of Rajbhandari et al. 2019, arXiv:1910.02054, 5.1.

Each process keeps the state of some of the trained tensors, steps these, and sends them to the others. Gradients are
summed over all processes as without sharding, so that the weights come out the same to the bit. Fleet's own stage 1,
`DygraphShardingOptimizer`, returns as its state what this process keeps, under generated names; a checkpoint here holds
all of it, whatever the number of processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.errors import ArgumentError
from finetune.train.processes.parallel import World


def share_out(sizes: dict[str, int], parts: int) -> dict[str, int]:
    """Name -> part, so that the parts come out about even: the largest first, each to the part that has least.

    >>> share_out({"a": 2, "b": 5, "c": 2, "d": 1}, 2)
    {'b': 0, 'a': 1, 'c': 1, 'd': 1}
    """
    loads = [0] * parts
    owners: dict[str, int] = {}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += size
    return owners


class Shards:
    """Which process keeps the optimizer's state of which tensor.

    Processes stand in groups of `degree`, in the order of their ranks; each group holds the whole state once.
    """

    def __init__(self, world: World, degree: int, sizes: dict[str, int]):
        """Every process must come here at the same time.

        Args:
            world: This process; its size is a multiple of `degree`.
            degree: Processes that share one state.
            sizes: Elements of each trained tensor, by name; the same on all processes.

        Raises:
            ArgumentError: there are fewer tensors than processes to share them.
        """
        if len(sizes) < degree:
            raise ArgumentError(
                f"the optimizer's state cannot be split over {degree} processes: {len(sizes)} tensors are trained",
                where="distributed.sharding_parallel_degree",
                fix=f"Set it to at most {len(sizes)}, or leave distributed.sharding out.",
            )
        self.world = world
        self._first = world.rank // degree * degree
        self._owners = share_out(sizes, degree)
        self._group = _group(world, degree)

    @property
    def holds_checkpoint(self) -> bool:
        """Whether this process is in the group of rank 0, which writes the checkpoints."""
        return self._first == 0

    def is_own(self, name: str) -> bool:
        """Whether this process keeps the state of a tensor."""
        return self._first + self._owners[name] == self.world.rank

    def send(self, name: str, tensor: Any) -> None:
        """Replace a tensor by that of the process which keeps the state of `name`; the whole group calls it."""
        import paddle

        paddle.distributed.broadcast(tensor, src=self._first + self._owners[name], group=self._group)

    def collect(
        self, name: str, array: np.ndarray | None, shape: tuple[int, ...], dtype: str = "float32"
    ) -> np.ndarray | None:
        """Bring a piece of state to rank 0; all of its group call it.

        Args:
            name: The tensor that it belongs to.
            array: Of this shape and dtype; None on processes that do not keep it.
            shape, dtype: Of the array.

        Returns:
            The array on rank 0, None elsewhere.
        """
        import paddle

        # By way of the device, from where alone NCCL sends: Paddle keeps some of the state in the CPU's memory.
        tensor = paddle.empty(shape, dtype) if array is None else paddle.to_tensor(array)
        self.send(name, tensor)
        return tensor.numpy() if self.world.is_main else None


def _group(world: World, degree: int) -> Any | None:
    """Paddle's group of the processes that share one state with this one; None for all."""
    if degree == world.size:
        return None
    import paddle

    own = None
    for first in range(0, world.size, degree):  # each is made by all processes, those outside it too
        group = paddle.distributed.new_group(list(range(first, first + degree)))
        world.barrier()  # gloo groups that are made at the same time wait for each other's members, for ever
        own = group if first <= world.rank < first + degree else own
    return own
