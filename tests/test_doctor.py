"""The checks of `finetune doctor`, given what a machine could have."""

from __future__ import annotations

import subprocess

import pytest

from finetune import doctor

GOOD = {
    "paddlepaddle": "3.3.1",
    "paddlenlp": "3.0.0b4",
    "aistudio-sdk": "0.2.6",
    "pyarrow": "25.0.1",
    "pip": "24.0",
    "setuptools": "75.0",
    "datasets": "5.0.1",
    "numpy": "1.26.4",
    "tokenizers": "0.21.4",
}
CPU_PROBE = {"version": "3.3.1", "cuda": False, "devices": 0, "sum": 8.0}


def _states(checks) -> dict[str, str]:
    return {check.name: check.state for check in checks}


@pytest.mark.parametrize(
    ("version", "state"),
    [((3, 9, 1), "fail"), ((3, 10, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "fail")],
)
def test_python_version(version, state):
    assert doctor.check_python(version, "Linux", "x86_64").state == state


def test_from_python_3_13_on_paddlenlp_is_installed_past_its_pin():
    assert doctor.how_to_install((3, 12)) == "`pip install paddle-finetune[cpu]`"
    second = "`pip install --no-deps paddlenlp==3.0.0b4`"
    assert doctor.how_to_install((3, 13)) == f"`pip install paddle-finetune[cpu]` and {second}"


def test_other_platforms_are_noted():
    assert doctor.check_python((3, 11, 0), "Darwin", "arm64").state == "note"


def test_good_packages_pass():
    assert set(_states(doctor.check_packages(GOOD)).values()) == {"ok"}


@pytest.mark.parametrize(
    ("change", "name", "fix"),
    [
        ({"paddlepaddle": None}, "versions", "pip install"),
        ({"paddlepaddle": "2.6.2"}, "versions", "3.3.1"),
        ({"paddlenlp": "2.8.1"}, "versions", "3.0.0b4"),
        ({"paddlepaddle-gpu": "3.3.1"}, "versions", "uninstall"),
        ({"aistudio-sdk": "0.3.1"}, "aistudio-sdk", "aistudio-sdk<0.3"),
        ({"aistudio-sdk": None}, "aistudio-sdk", "aistudio-sdk<0.3"),
        ({"pyarrow": "26.0.0"}, "pyarrow", "pyarrow<26"),
        ({"setuptools": None}, "packages", "pip install setuptools"),
    ],
)
def test_each_bad_package_fails_with_its_fix(change, name, fix):
    versions = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    bad = [check for check in doctor.check_packages(versions) if check.state == "fail"]
    assert [check.name for check in bad] == [name]
    assert fix in bad[0].fix


def test_version_tuple():
    assert doctor.version_tuple("3.0.0b4") == (3, 0, 0)
    assert doctor.version_tuple("25.0.1") == (25, 0, 1)
    assert doctor.version_tuple("dev") == ()


@pytest.mark.parametrize(
    ("probe", "gpus", "versions", "states"),
    [
        (CPU_PROBE, None, GOOD, {"paddle": "ok", "gpu": "ok"}),
        (CPU_PROBE, ["NVIDIA L4, 23034 MiB, 570"], GOOD, {"paddle": "ok", "gpu": "fail"}),
        ({**CPU_PROBE, "cuda": True, "devices": 1}, ["NVIDIA L4"], GOOD, {"paddle": "ok", "gpu": "ok"}),
        (CPU_PROBE, None, {"paddlepaddle-gpu": "3.3.1"}, {"paddle": "ok", "gpu": "fail"}),
        ("ended by signal 6", None, GOOD, {"paddle": "fail", "gpu": "ok"}),
        ({**CPU_PROBE, "sum": 7.0}, [], GOOD, {"paddle": "fail", "gpu": "ok"}),
    ],
)
def test_paddle_and_gpu(probe, gpus, versions, states):
    checks = list(doctor.check_paddle(probe, gpus, versions))
    assert _states(checks) == states
    assert all(check.fix for check in checks if check.state == "fail")


@pytest.mark.parametrize(
    ("environment", "state"),
    [
        ({}, "ok"),
        ({"OMP_NUM_THREADS": "4"}, "note"),
        ({"OMP_NUM_THREADS": "1"}, "ok"),
        ({"MKL_NUM_THREADS": "1"}, "note"),
        ({"MKL_NUM_THREADS": "4"}, "ok"),
    ],
)
def test_threads(environment, state):
    assert doctor.check_threads(environment, 4).state == state


def test_memory_and_disk_are_noted_when_short():
    assert doctor.check_memory(0.5).state == "note"
    assert doctor.check_memory(16).state == "ok"
    assert doctor.check_disk(1).state == "note"
    assert doctor.check_disk(100).state == "ok"


def test_unreachable_hub_fails_with_its_fix():
    check = doctor.check_hub("http://127.0.0.1:9")
    assert check.state == "fail" and "HF_ENDPOINT" in check.fix


def test_probe_survives_an_abort(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", "import os; os.abort()")
    assert doctor.probe_paddle() == "the import ended by signal 6"


def test_probe_gives_the_last_line_of_an_error(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", "raise ImportError('no such thing')")
    assert doctor.probe_paddle() == "ImportError: no such thing"


def test_probe_gives_up(monkeypatch):
    def never_ends(*args, **kwargs):
        raise subprocess.TimeoutExpired("python", 180)

    monkeypatch.setattr(subprocess, "run", never_ends)
    assert "180 s" in doctor.probe_paddle()


@pytest.mark.parametrize(("probe", "code"), [(CPU_PROBE, 0), ("ended by signal 6", 1)])
def test_exit_code_and_report(monkeypatch, probe, code):
    monkeypatch.setattr(doctor, "installed_versions", lambda: GOOD)
    monkeypatch.setattr(doctor, "probe_paddle", lambda: probe)
    monkeypatch.setattr(doctor, "list_gpus", lambda: None)
    monkeypatch.setattr(doctor, "check_hub", lambda: pytest.fail("the network is used only when asked"))
    lines: list[str] = []
    assert doctor.doctor(write=lines.append) == code
    assert lines[-1] == ("All checks passed." if code == 0 else "1 check failed.")
    assert any(line.startswith("fail  paddle") for line in lines) == bool(code)
