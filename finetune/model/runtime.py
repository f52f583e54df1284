"""Paddle and PaddleNLP brought up quietly, with every core in use. Import paddle only through here.

Set before the import, since both are read once:
- `MKL_NUM_THREADS`: matrix products use one thread as they come; with all cores they run 2.2 times faster.
  `OMP_NUM_THREADS` is left alone: setting it makes a step three times slower (docs/log.md).
- `GLOG_minloglevel`: C++ information lines off.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import lru_cache

_NOISE = (
    "No ccache found",
    "Setuptools is replacing distutils",
    r"(?s).*swiglu",
    r".*pkg_resources is deprecated",
)


@lru_cache(maxsize=1)
def paddle():
    """Import paddle, choose the device, and return the module. PaddleNLP is loaded and silenced too."""
    os.environ.setdefault("MKL_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    import paddle as module
    from paddlenlp.utils.log import logger

    logger.set_level("ERROR")
    logging.getLogger("paddle").setLevel(logging.ERROR)
    return module


def device() -> str:
    """The device in use: `cpu` or `gpu:N`."""
    return paddle().get_device()


def resolve_dtype(name: str) -> str:
    """`auto` becomes bfloat16 on GPU and float32 on CPU; others are checked against the device.

    Raises:
        ArgumentError: half precision asked for on CPU, where paddle has no kernels for it.
    """
    from finetune.errors import ArgumentError

    on_cpu = device() == "cpu"
    if name == "auto":
        return "float32" if on_cpu else "bfloat16"
    if on_cpu and name != "float32":
        raise ArgumentError(
            f"{name} was asked for, but paddle has no {name} kernels on CPU",
            where="model.dtype",
            fix="Use float32 or auto here; bfloat16 needs a GPU.",
        )
    return name
