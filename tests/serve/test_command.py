"""The server as a process, and what it says before it has a model."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest

from finetune.errors import ArgumentError
from finetune.serve.app import serve

ROOT = Path(__file__).resolve().parents[2]
HELLO = [{"role": "user", "content": "Hello"}]


def test_the_process_greets_answers_and_stops_gracefully(tiny_untied_folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "serve", str(tiny_untied_folder), "--port", "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FINETUNE_API_KEY": "k"},
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline()).group()
        curl = shlex.split("".join(process.stderr.readline() for _ in range(4)).replace("\\\n", ""))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k")
        stream = client.chat.completions.create(
            model=tiny_untied_folder.name,
            messages=HELLO,
            max_tokens=100,
            stream=True,
            extra_body={"stop_token_ids": []},
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        out, err = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
    assert chunks[-1].choices[0].finish_reason == "length"
    assert curl[:4] == ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    assert "FINETUNE_API_KEY" in curl[5] and json.loads(curl[7])["messages"] == HELLO
    assert (process.returncode, out, err.strip()) == (0, "", "Stopped.")


def test_an_address_in_use_is_said_before_the_model_loads():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ArgumentError, match="--port"):
            serve("no/such/model", port=taken.getsockname()[1])
    with pytest.raises(ArgumentError, match="--host"):
        serve("no/such/model", host="no.such.host.invalid")
