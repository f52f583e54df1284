"""`finetune doctor`: what this machine has, what the toolkit needs, and the fix for each difference.

Paddle is tried in a process of its own: a broken installation can abort in C++ and would take the check with it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

PADDLE_VERSION = "3.3.1"
PADDLENLP_VERSION = "3.0.0b4"
HUB = "https://huggingface.co"
_PADDLE_INDEX = "https://www.paddlepaddle.org.cn/packages/stable/cu126/"
_PIN_OF_NUMPY_ENDS = (3, 13)  # from this Python on paddlenlp's numpy has no wheel, and it is installed past its pin

# The paths of this process and not the current folder, which `python -c` would put first: it may be a stranger's model
# with a json.py in it.
_PROBE = (
    f"import sys; sys.path[:] = {sys.path!r}"
    + """
import json
from finetune.model.runtime import paddle
module = paddle()
print("PROBE" + json.dumps({
    "version": module.__version__,
    "cuda": module.is_compiled_with_cuda(),
    "devices": module.device.cuda.device_count() if module.is_compiled_with_cuda() else 0,
    "sum": float(module.ones([2, 2]).matmul(module.ones([2, 2])).sum()),
}))
"""
)


def how_to_install(python: tuple[int, ...]) -> str:
    """The command or the two that install paddle and paddlenlp for a version of Python, within a sentence."""
    second = f" and `pip install --no-deps paddlenlp=={PADDLENLP_VERSION}`" if python >= _PIN_OF_NUMPY_ENDS else ""
    return f"`pip install paddle-finetune[cpu]`{second}"


def _install_or_gpu() -> str:
    install = how_to_install(sys.version_info[:2])
    return f"Run {install}, or put in paddlepaddle-gpu {PADDLE_VERSION} from {_PADDLE_INDEX}"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        state: `ok`, `note` (works, but could be better) or `fail`.
        found: What is there.
        fix: What to do about it; None when all is well.
    """

    name: str
    state: str
    found: str
    fix: str | None = None


def doctor(*, network: bool = False, write: Callable[[str], object] = print) -> int:
    """Run all checks and write one line for each.

    Args:
        network: Also try to reach the model hub; nothing is sent otherwise.

    Returns:
        0 when nothing failed, else 1.
    """
    failed = 0
    for check in _checks(network):
        failed += check.state == "fail"
        write(f"{check.state:<4}  {check.name:<13} {check.found}")
        if check.fix:
            write(f"{'':<20}{check.fix}")
    write(f"{failed} check{'s' if failed > 1 else ''} failed." if failed else "All checks passed.")
    return 1 if failed else 0


def _checks(network: bool) -> Iterator[Check]:
    yield check_python(sys.version_info[:3], platform.system(), platform.machine())
    versions = installed_versions()
    yield from check_packages(versions)
    gpus = list_gpus()
    yield from check_paddle(probe_paddle(), gpus, versions)
    yield check_threads(os.environ, len(os.sched_getaffinity(0)))
    yield check_memory(_memory_gib())
    yield check_disk(shutil.disk_usage(Path.cwd()).free / 2**30)
    if network:
        yield check_hub()


def check_python(version: tuple[int, ...], system: str, machine: str) -> Check:
    """Python 3.10 to 3.13 on Linux x86-64, where paddle has wheels that were tried."""
    found = f"{'.'.join(map(str, version))} on {system} {machine}"
    if not (3, 10) <= version[:2] <= (3, 13):
        return Check("python", "fail", found, "Make the environment with Python 3.10, 3.11, 3.12 or 3.13.")
    if (system, machine) != ("Linux", "x86_64"):
        return Check("python", "note", found, "Only Linux on x86-64 is tested.")
    return Check("python", "ok", found)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter here, without importing them; absent ones are left out."""
    versions = {}
    names = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "aistudio-sdk", "pyarrow", "numpy", "tokenizers", "pip")
    for name in (*names, "setuptools", "datasets"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_packages(versions: dict[str, str]) -> Iterator[Check]:
    """The pair of paddle and paddlenlp, and the pins without which paddlenlp fails to import."""
    paddles = [name for name in ("paddlepaddle", "paddlepaddle-gpu") if name in versions]
    shown = ", ".join(f"{name} {versions[name]}" for name in (*paddles, "paddlenlp") if name in versions) or "nothing"
    if not paddles or "paddlenlp" not in versions:
        yield Check("versions", "fail", f"{shown} installed", _install_or_gpu())
    elif len(paddles) == 2:
        fix = "Both write the same files: `pip uninstall -y paddlepaddle paddlepaddle-gpu`, then install one of them."
        yield Check("versions", "fail", shown, fix)
    elif versions[paddles[0]] != PADDLE_VERSION or versions["paddlenlp"] != PADDLENLP_VERSION:
        right = f"{paddles[0]} {PADDLE_VERSION} with paddlenlp {PADDLENLP_VERSION}"
        yield Check("versions", "fail", shown, f"Install {right}; other pairs fail to import or abort.")
    else:
        yield Check("versions", "ok", shown)
    for name, limit in (("aistudio-sdk", (0, 3)), ("pyarrow", (26,))):
        found = versions.get(name)
        bound = ".".join(map(str, limit))
        if found is None or version_tuple(found) >= limit:
            fix = f"paddlenlp {PADDLENLP_VERSION} fails to import so: `pip install '{name}<{bound}'`."
            yield Check(name, "fail", found or "not installed", fix)
        else:
            yield Check(name, "ok", found)
    missing = [name for name in ("pip", "setuptools", "datasets", "numpy", "tokenizers") if name not in versions]
    if missing:
        names = " ".join(missing)
        yield Check("packages", "fail", f"not installed: {names}", f"Run `pip install {names}`.")


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: `3.0.0b4` is (3, 0, 0)."""
    numbers: list[int] = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def probe_paddle() -> dict | str:
    """Import paddle and paddlenlp in a new process and multiply two matrices: what it says, or how it failed."""
    try:
        run = subprocess.run([sys.executable, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "the import took more than 180 s"
    for line in run.stdout.splitlines():
        if line.startswith("PROBE"):
            return json.loads(line.removeprefix("PROBE"))
    if run.returncode < 0:
        return f"the import ended by signal {-run.returncode}"
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"the import ended with code {run.returncode}"


def list_gpus() -> list[str] | None:
    """Names of NVIDIA GPUs as nvidia-smi gives them; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in run.stdout.splitlines() if line.strip()] if run.returncode == 0 else []


def check_paddle(probe: dict | str, gpus: list[str] | None, versions: dict[str, str]) -> Iterator[Check]:
    """Whether paddle starts, and whether its build fits the GPUs there are."""
    if isinstance(probe, str):
        yield Check("paddle", "fail", f"does not start: {probe}", _install_or_gpu())
    elif probe["sum"] != 8.0:
        yield Check("paddle", "fail", f"multiplies wrongly: {probe['sum']} for 8", _install_or_gpu())
    else:
        yield Check("paddle", "ok", f"{probe['version']} starts, {'CUDA' if probe['cuda'] else 'CPU'} build")
    devices = 0 if isinstance(probe, str) else probe["devices"]
    if gpus is None or not gpus:
        found = "no nvidia-smi, so no NVIDIA driver" if gpus is None else "nvidia-smi finds no GPU"
        if "paddlepaddle-gpu" in versions:
            yield Check("gpu", "fail", found, "Install the NVIDIA driver, or paddlepaddle without -gpu.")
        else:
            yield Check("gpu", "ok", f"none ({found}); training runs on CPU in float32")
    elif devices == 0:
        fix = f"`pip uninstall -y paddlepaddle; pip install paddlepaddle-gpu=={PADDLE_VERSION} -i {_PADDLE_INDEX}`"
        if "paddlepaddle-gpu" in versions:
            fix = "paddle cannot use it: the driver may be too old for this CUDA build, or CUDA_VISIBLE_DEVICES empty."
        yield Check("gpu", "fail", f"{'; '.join(gpus)}, not used by paddle", fix)
    else:
        yield Check("gpu", "ok", f"{devices} usable: {'; '.join(gpus)}")


def check_threads(environment: dict[str, str] | os._Environ, cores: int) -> Check:
    """Thread settings that make training slow; without any the toolkit sets MKL_NUM_THREADS to all cores itself."""
    omp, mkl = environment.get("OMP_NUM_THREADS"), environment.get("MKL_NUM_THREADS")
    if omp not in (None, "", "1"):
        fix = "Unset it: with paddle it makes a training step three times slower (docs/log.md)."
        return Check("threads", "note", f"{cores} cores, OMP_NUM_THREADS={omp}", fix)
    if mkl and mkl != str(cores):
        fix = f"Unset it to use all {cores} cores."
        return Check("threads", "note", f"{cores} cores, MKL_NUM_THREADS={mkl}", fix)
    return Check("threads", "ok", f"{cores} cores")


def _memory_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def check_memory(gib: float) -> Check:
    """Free memory against what the quickstart takes."""
    if gib < 2:
        return Check("memory", "note", f"{gib:.1f} GiB free", "The quickstart needs about 2 GiB: close other programs.")
    return Check("memory", "ok", f"{gib:.1f} GiB free")


def check_disk(gib: float) -> Check:
    """Free disk space in the current folder, where outputs/ goes."""
    if gib < 5:
        fix = "A checkpoint of a 0.5B model trained in full takes 7 GB: set training.output_dir to a larger disk."
        return Check("disk", "note", f"{gib:.1f} GiB free in {Path.cwd()}", fix)
    return Check("disk", "ok", f"{gib:.1f} GiB free in {Path.cwd()}")


def check_hub(url: str = HUB) -> Check:
    """Whether the hub answers."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=10).close()
    except HTTPError:
        return Check("hub", "ok", f"{url} answers")
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Check("hub", "fail", f"{url}: {reason}", "Use local model folders, or set HF_ENDPOINT to a mirror.")
    return Check("hub", "ok", f"{url} answers")
