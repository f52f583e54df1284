"""What a result was measured on, and where it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.folders import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict:
    """Processor, cores, memory, Python, commit, time and load."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory,
        "python": platform.python_version(),
        "commit": commit(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "load_before": os.getloadavg()[0],
    }


def commit() -> str | None:
    """The commit that is measured, with a + where files of it were changed; None outside of a checkout."""
    told = []
    for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        if found.returncode:
            return None
        told.append(found.stdout.strip())
    return told[0] + ("+" if told[1] else "")


def write_record(path: Path, record: dict) -> None:
    """Write results, after each case anew so that a later failure loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
