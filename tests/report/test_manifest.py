"""manifest.json: complete, repeatable, and without secrets."""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime, timedelta, timezone

import pytest

from finetune.report.manifest import available_cpus, build_manifest, installed_versions, redact, write_manifest

START = datetime(2026, 11, 23, 12, 0, 0, tzinfo=timezone(timedelta(hours=2)))


def build(**changes):
    arguments = dict(
        method="sft",
        base_model={"path": "Qwen/Qwen2-0.5B", "parameters": 494032768},
        data={"train": {"files": [{"path": "a.jsonl", "rows": 3, "sha256": "0" * 64}], "kept": 3}},
        seed=42,
        device="cpu",
        command=["finetune", "train", "recipe.yaml"],
        started=START,
        versions={"numpy": "1.26.4"},
        cpu_count=2,
    )
    return build_manifest(**{**arguments, **changes})


def test_the_same_run_gives_the_same_manifest():
    assert build() == build()
    manifest = build(finished=START + timedelta(seconds=52.5), status="finished")
    assert manifest["started"] == "2026-11-23T10:00:00+00:00"
    assert manifest["seconds"] == 52.5
    assert manifest["status"] == "finished"
    assert manifest["data"]["train"]["files"][0]["rows"] == 3
    assert build()["finished"] is None and build()["seconds"] is None


def test_it_holds_no_host_name_and_no_environment(monkeypatch):
    monkeypatch.setenv("SOME_PRIVATE_VARIABLE", "the-value-of-it")
    text = json.dumps(build(versions=None, cpu_count=None))
    assert "the-value-of-it" not in text
    assert socket.gethostname() not in text


def test_installed_versions_leave_out_what_is_missing():
    versions = installed_versions(["numpy", "no-such-package-here"])
    assert list(versions) == ["numpy"]
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/data.jsonl", "https://***@host/data.jsonl"),
        ("https://host/d?token=abc123&split=train", "https://host/d?token=***&split=train"),
        ("https://host/d?X-Amz-Signature=abc", "https://host/d?X-Amz-Signature=***"),
        ("hf_token=abc", "hf_token=***"),
        ("using hf_abcdefghijklmnopqrstuv here", "using *** here"),
        ("password: secret1", "password: ***"),
        ("token: eyJhbGci.eyJzdWIi.c2ln, next", "token: ***, next"),
        (
            "no supervised token: data/a.jsonl:1, data/a.jsonl:2.",
            "no supervised token: data/a.jsonl:1, data/a.jsonl:2.",
        ),
        (
            "model.path=Qwen/Qwen2-0.5B max_new_tokens=5 eos_token=x",
            "model.path=Qwen/Qwen2-0.5B max_new_tokens=5 eos_token=x",
        ),
        ("data/token/train.jsonl", "data/token/train.jsonl"),
        ("user@example.org", "user@example.org"),
    ],
)
def test_redaction(text, shown):
    assert redact(text) == shown
    assert redact({"a": [text, 1, None]}) == {"a": [shown, 1, None]}


def test_secrets_in_the_command_are_hidden():
    command = ["finetune", "train", "r.yaml", "--hf-token", "abc", "data.train=[{path: https://u:p@h/x}]"]
    assert build(command=command)["command"] == [
        "finetune", "train", "r.yaml", "--hf-token", "***", "data.train=[{path: https://***@h/x}]",
    ]  # fmt: skip


def test_writing_replaces_the_file_whole(tmp_path):
    path = tmp_path / "manifest.json"
    write_manifest(path, build())
    write_manifest(path, build(status="stopped"))
    assert json.loads(path.read_text())["status"] == "stopped"
    assert list(tmp_path.iterdir()) == [path]
