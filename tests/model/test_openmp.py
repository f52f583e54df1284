"""OpenMP on a machine that has none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finetune.errors import FinetuneError
from finetune.model.openmp import bring_openmp

# The loader finds a library by its name alone only once it is loaded under it.
LOADED = """
import ctypes
from finetune.model.openmp import bring_openmp
def there():
    try:
        return bool(ctypes.CDLL("libgomp.so.7").omp_get_max_threads())
    except OSError:
        return False
before = there()
bring_openmp("libgomp.so.7")
print(before, there())
import sklearn.cluster
"""


def test_what_a_wheel_holds_is_loaded_under_the_usual_name():
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert run.stdout == "False True\n", run.stderr


def test_without_any_the_package_is_named():
    with pytest.raises(FinetuneError, match=r"needs libgomp.so.7, which .*apt-get install libgomp1"):
        bring_openmp("libgomp.so.7", holders=("json", "not_there"))
