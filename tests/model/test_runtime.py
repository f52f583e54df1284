"""What is set before paddle is imported."""

from __future__ import annotations

import os

import pytest

from finetune.model.runtime import needs_avx2_hint, threads

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx avx2 fma avx512f\n\n"
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2 fma\n\n"
HYGON = "processor\t: 0\nvendor_id\t: HygonGenuine\nflags\t\t: fpu fma avx2\n\n"
OLD_AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx fma\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd\n\n"


@pytest.mark.parametrize(
    "text, wanted", [(INTEL, False), (AMD, True), (HYGON, True), (OLD_AMD, False), (ARM, False), ("", False)]
)
def test_mkl_is_told_of_avx2_where_it_would_not_look(tmp_path, text, wanted):
    path = tmp_path / "cpuinfo"
    path.write_text(text + INTEL, encoding="utf-8") if text else path.touch()
    assert needs_avx2_hint(path) is wanted
    assert needs_avx2_hint(tmp_path / "not there") is False


@pytest.mark.parametrize("value, wanted", [("3", 3), ("1", 1), (None, "cores"), ("", "cores"), ("0", "cores")])
def test_threads(monkeypatch, value, wanted):
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("MKL_NUM_THREADS", value)
    assert threads() == (len(os.sched_getaffinity(0)) if wanted == "cores" else wanted)
