"""bitsandbytes' AdamW8bit over given gradients: `python ref_adam.py JOB.npz ANSWER.npz`.

A job has `weight` [n], `gradients` [steps, n], `rates` [steps], `betas`, `epsilon` and `weight_decay`; the answer the
`weight`, and codes and scales of both moments. On CPU bitsandbytes takes codes from 65,536 points between -1 and 1; it
is given moments in float64, for which it takes the nearest level, as its kernel for GPUs does.
"""

from __future__ import annotations

import sys

import bitsandbytes
import numpy as np
import torch
from bitsandbytes.backends.cpu import ops


def exact(moment: torch.Tensor, *rest: object, quantize=ops._quant_blockwise_fp32_direct) -> None:
    """bitsandbytes' own quantization, by its way for float64."""
    quantize(moment.double(), *rest)


if __name__ == "__main__":
    ops._quant_blockwise_fp32_direct = exact
    job = np.load(sys.argv[1])
    weight = torch.nn.Parameter(torch.tensor(job["weight"]))
    betas, epsilon, decay = tuple(job["betas"].tolist()), float(job["epsilon"]), float(job["weight_decay"])
    optimizer = bitsandbytes.optim.AdamW8bit([weight], betas=betas, eps=epsilon, weight_decay=decay)
    for gradient, rate in zip(job["gradients"], job["rates"].tolist()):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    state = optimizer.state[weight]
    names = {"moment1": "state1", "moment2": "state2", "scale1": "absmax1", "scale2": "absmax2"}
    found = {ours: state[theirs].numpy().reshape(-1) for ours, theirs in names.items()}
    np.savez(sys.argv[2], weight=weight.detach().numpy(), **found)
