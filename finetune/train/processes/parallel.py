"""Several processes working on one step: sums of counts, sums of gradients.

Each rank runs the same code on its own rows; gradients are of loss sums over the step's global count, so that ranks
are added up, never averaged. Launched by `paddle.distributed.launch`, which picks gloo on CPU and NCCL on GPU.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.model.runtime import paddle as bring_up

# Gradients are joined into buffers of this many elements before they are summed over ranks.
_BUCKET = 16 * 1024 * 1024


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and prints."""
        return self.rank == 0

    def all_sum(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks, in float64."""
        if self.size == 1:
            return [float(v) for v in values]
        import paddle

        tensor = paddle.to_tensor(np.asarray(values, np.float64))
        paddle.distributed.all_reduce(tensor)
        return [float(v) for v in tensor.numpy()]

    def sum_gradients(self, parameters: dict) -> None:
        """Replace each parameter's gradient by its sum over all ranks."""
        if self.size == 1:
            return
        import paddle

        bucket: list = []
        count = 0
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = paddle.zeros_like(parameter)
            bucket.append(parameter.grad)
            count += parameter.grad.size
            if count >= _BUCKET:
                _sum_bucket(bucket)
                bucket, count = [], 0
        if bucket:
            _sum_bucket(bucket)

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order."""
        text = json.dumps(value).encode()
        lengths = self.all_sum([float(len(text)) if rank == self.rank else 0.0 for rank in range(self.size)])
        letters = np.zeros((self.size, int(max(lengths))))
        letters[self.rank, : len(text)] = list(text)
        all_letters = np.array(self.all_sum(letters.ravel().tolist()), np.uint8).reshape(letters.shape)
        return [json.loads(bytes(row).rstrip(b"\0")) for row in all_letters]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            import paddle

            paddle.distributed.barrier()


def _sum_bucket(gradients: list) -> None:
    import paddle

    flat = paddle.concat([g.flatten() for g in gradients])
    paddle.distributed.all_reduce(flat)
    start = 0
    for gradient in gradients:
        stop = start + gradient.size
        paddle.assign(flat[start:stop].reshape(gradient.shape), gradient)
        start = stop


def world_from_environment() -> World:
    """Rank and size as the launcher set them, without starting anything."""
    return World(int(os.environ.get("PADDLE_TRAINER_ID", "0")), int(os.environ.get("PADDLE_TRAINERS_NUM", "1")))


def join(world: World) -> None:
    """Connect this process to its peers."""
    if world.size > 1:
        module = bring_up()
        with contextlib.redirect_stderr(io.StringIO()):  # it lists flags that Paddle itself changed
            module.distributed.init_parallel_env()
