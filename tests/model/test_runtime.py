"""What is set before paddle is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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


LOADED = "import sys; import finetune.model.build; before = sys.modules['paddlenlp']; "


@pytest.mark.parametrize(
    "code",
    [
        "from paddlenlp import Taskflow",
        "import paddlenlp; paddlenlp.Taskflow",
        "import paddlenlp.trainer; paddlenlp.trainer.Trainer",
        "from paddlenlp.peft import LoKrModel, LoRAModel; assert LoRAModel is finetune.model.build.LoRAModel",
        "import paddlenlp.peft.prefix; from paddlenlp.peft import LoRAModel",
        "from paddlenlp.trl import DPOTrainer",
    ],
)
def test_all_of_paddlenlp_is_there_for_who_asks(code):
    _run(LOADED + code + "; assert sys.modules['paddlenlp'] is before and 'sklearn' in sys.modules")


def test_models_are_loaded_without_the_rest_of_paddlenlp():
    _run(
        LOADED,
        "assert not {'sklearn', 'datasets', 'pandas', 'fastapi', 'paddlenlp.trainer'} & set(sys.modules)",
        "import paddlenlp; assert paddlenlp.__version__ == '3.0.0b4'",
        "from paddlenlp.transformers import AutoModelForCausalLM, LlamaForCausalLM",
        "assert not hasattr(paddlenlp, '__wrapped__') and 'sklearn' not in sys.modules",
        "assert not hasattr(paddlenlp, 'no_such_name') and 'sklearn' in sys.modules",
    )


def test_a_paddlenlp_that_is_there_already_stays():
    _run(
        "import sys, paddlenlp; from paddlenlp.peft import LoRAModel; import finetune.model.build",
        "assert sys.modules['paddlenlp'] is paddlenlp and finetune.model.build.LoRAModel is LoRAModel",
    )


def _run(*lines: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_sigterm_while_paddle_loads_ends_the_process_without_a_word():
    """Half of the import is behind it; paddle's own handler, in place by then, would print a C++ stack or crash."""
    code = (
        "import os, signal, finetune.model.runtime as runtime; "
        "runtime.defer_paddlenlp = lambda: os.kill(os.getpid(), signal.SIGTERM); runtime.paddle()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGTERM, "", "")
