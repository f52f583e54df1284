"""Paddle and PaddleNLP brought up quietly, with every core in use. Import paddle only through here.

Set before the import, since each is read once:
- `MKL_NUM_THREADS`: matrix products use one thread as they come; with all cores they run 2.2 times faster.
  `OMP_NUM_THREADS` is left alone: setting it makes a step three times slower (docs/log.md).
- `MKL_DEBUG_CPU_TYPE`: the MKL that Paddle brings takes its slowest path on processors that are not Intel's; 5 names
  the AVX2 path, with which products run 3.3 times faster on an AMD EPYC (docs/log.md).
- `GLOG_minloglevel`: C++ information lines off.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

from finetune.errors import ArgumentError
from finetune.model.deferred import defer_paddlenlp
from finetune.model.openmp import bring_openmp

_NOISE = (
    "No ccache found",
    "Setuptools is replacing distutils",
    r"(?s).*swiglu",
    r".*pkg_resources is deprecated",
)


@lru_cache(maxsize=1)
def paddle() -> ModuleType:
    """Import paddle, choose the device, and return the module. PaddleNLP is loaded and silenced too."""
    os.environ.setdefault("MKL_NUM_THREADS", str(threads()))
    if needs_avx2_hint(Path("/proc/cpuinfo")):
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    bring_openmp()
    with _sigterm_waits():
        import paddle as module

        defer_paddlenlp()
        from paddlenlp.utils.log import logger

        module.disable_signal_handler()  # as paddlenlp does: a signal is Python's, without a C++ stack trace

    logger.set_level("ERROR")
    logging.getLogger("paddle").setLevel(logging.ERROR)
    return module


@contextmanager
def _sigterm_waits() -> Iterator[None]:
    """Keep SIGTERM back until the end. Paddle's own handler, in place while paddle is imported, allocates memory in
    whatever the signal interrupts: it prints a C++ stack, or glibc aborts on a heap found half changed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def threads() -> int:
    """Threads that this process may keep busy: MKL_NUM_THREADS, which `--nproc` shares out, or all its cores."""
    asked = os.environ.get("MKL_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0))


def needs_avx2_hint(cpuinfo: Path) -> bool:
    """Whether MKL would not find out by itself that it may use AVX2: from /proc/cpuinfo, of the first processor."""
    try:
        first = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return False
    fields = {name.strip(): value.split() for name, _, value in (line.partition(":") for line in first.splitlines())}
    found = {"avx2", "fma"} <= set(fields.get("flags", []))
    return found and fields.get("vendor_id") != ["GenuineIntel"]


def device() -> str:
    """The device in use: `cpu` or `gpu:N`."""
    name: str = paddle().get_device()
    return name


def resolve_dtype(name: str) -> str:
    """`auto` becomes bfloat16 on GPU and float32 on CPU; others are checked against the device.

    Raises:
        ArgumentError: half precision asked for on CPU, where paddle has no kernels for it.
    """
    return dtype_on(name, on_cpu=device() == "cpu")


def gpu_count() -> int:
    """NVIDIA GPUs that paddle will see, asked without importing it: none without a driver, or with paddle for CPU."""
    try:
        metadata.distribution("paddlepaddle-gpu")
    except metadata.PackageNotFoundError:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return there if visible is None else min(there, sum(bool(name.strip()) for name in visible.split(",")))


def device_bytes() -> int:
    """Memory of the device in use: a GPU's own, else the part of main memory that this process may take."""
    library = paddle()
    if device() != "cpu":
        return int(library.device.cuda.get_device_properties().total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), resource.getrlimit(resource.RLIMIT_AS)[0]]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container: cgroup v2, v1
        with suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text(encoding="ascii")))
    return min(limit for limit in limits if limit != resource.RLIM_INFINITY)


def dtype_on(name: str, *, on_cpu: bool) -> str:
    """As `resolve_dtype`, for a device that is known.

    Raises:
        ArgumentError: half precision asked for on CPU.
    """
    if name == "auto":
        return "float32" if on_cpu else "bfloat16"
    if on_cpu and name != "float32":
        raise ArgumentError(
            f"{name} was asked for, but paddle has no {name} kernels on CPU",
            where="model.dtype",
            fix="Use float32 or auto here; bfloat16 needs a GPU.",
        )
    return name
