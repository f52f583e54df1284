"""Drawn bodies of up to 8 MB at a server in a process of its own: each answered in time, and the memory given back.

python -m pytest tests/soak/test_bodies.py
FINETUNE_SOAK_BODIES=500 python -m pytest tests/soak/test_bodies.py
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.infer.scripted import wait_for
from tests.serve import drawn

pytestmark = pytest.mark.timeout(0)

BODIES = int(os.environ.get("FINETUNE_SOAK_BODIES", "5000"))
SECONDS_PER_MB, LONGEST_HEALTH, MEMORY_KEPT = 1.0, 0.5, 100 * 2**20
HEADERS = {"content-type": "application/json"}
SIZES = st.sampled_from([0, 0, 10_000, 100_000, 1_000_000]) | st.integers(0, 8 * 2**20)


@pytest.fixture
def server(tiny_untied_folder, tmp_path):
    """The process id and the address."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "finetune", "serve", str(tiny_untied_folder), "--port", "0", "--name", "tiny"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file)
    try:
        wait_for(lambda: "http://" in log.read_text(), 60)
        address = re.search(r"http://[\d.]+:\d+", log.read_text())
        assert address is not None
        yield process.pid, address.group()
    finally:
        process.terminate()
        process.wait(60)


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch(url: str, done: Event, longest: multiprocessing.Queue) -> None:
    """In a process of its own: writing the bodies would delay it."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    worst = 0.0
    with httpx.Client(base_url=url, timeout=60) as client:
        while not done.wait(0.02):
            start = time.monotonic()
            assert client.get("/health").status_code == 200
            worst = max(worst, time.monotonic() - start)
    longest.put(worst)


def test_bodies_of_every_size(server):
    pid, url = server
    context = multiprocessing.get_context("spawn")
    done, longest = context.Event(), context.Queue()
    watcher = context.Process(target=watch, args=(url, done, longest), daemon=True)
    slowest: list[tuple[float, str, bytes]] = []
    with httpx.Client(base_url=url, timeout=120) as client:
        documented = client.get("/openapi.json").json()

        @settings(max_examples=BODIES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(drawn.requests(), SIZES, st.data())
        def each(request_, size, data):
            path, body = request_
            content = json.dumps(body).encode()
            if size and body:
                content = drawn.swollen(body, data.draw(st.sampled_from(sorted(body))), size)
            start = time.monotonic()
            answer = client.post(path, content=content, headers=HEADERS)
            seconds = time.monotonic() - start
            drawn.check(path, answer.status_code, answer.text, documented)
            if answer.status_code != 200:  # the others take as long as the model takes to say something
                slowest.append((seconds / max(1.0, len(content) / 2**20), path, content[:200]))

        before = resident(pid)
        watcher.start()
        each()
    done.set()
    health = longest.get(timeout=60)
    watcher.join(60)
    time.sleep(2)
    kept = resident(pid) - before
    slowest.sort(key=lambda entry: entry[0])
    print(f"slowest {slowest[-1][0]:.3f} s per MB, /health {health:.3f} s, {kept / 2**20:.0f} MB kept")
    assert slowest[-1][0] <= SECONDS_PER_MB, slowest[-3:]
    assert health <= LONGEST_HEALTH
    assert kept <= MEMORY_KEPT
