"""PaddleNLP without the two thirds of it that nothing here uses.

`import paddlenlp` runs `paddlenlp/__init__.py`, which imports every part of it, and with them scikit-learn, SciPy's
statistics, pandas, datasets and a web server: 2.0 s, of which the model and LoRA take 0.6. So `paddlenlp` and
`paddlenlp.peft` are put in place as packages whose `__init__` has not run. It runs as soon as anybody asks for more
than what is loaded: `from paddlenlp import Taskflow` or `import paddlenlp.trainer` do what they always do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_PACKAGES = ("paddlenlp", "paddlenlp.peft")
_lock = threading.RLock()


class _Deferred(ModuleType):
    """A package whose `__init__` has not run. It has no `__path__`, so that importing a part of it asks here too."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__" or not name.startswith("__"):  # Python asks any module for names such as __wrapped__
            _run_all(self)
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _run_all(package: ModuleType) -> None:
    """Run the `__init__` of a deferred package in place, after that of the whole, as an import would."""
    with _lock:
        for name in _PACKAGES:
            if sys.modules[name] in (sys.modules["paddlenlp"], package):
                _run(sys.modules[name])


def _run(package: ModuleType) -> None:
    deferred, spec = type(package) is _Deferred, package.__spec__
    if deferred and spec and spec.loader:
        package.__class__ = ModuleType  # what is missing while it runs is missing, as in any import
        package.__path__ = spec.submodule_search_locations or []
        spec.loader.exec_module(package)


def defer_paddlenlp() -> None:
    """Put `paddlenlp` and `paddlenlp.peft` in place, and load the model and LoRA. Nothing, where they are imported.

    Raises:
        ModuleNotFoundError: paddlenlp is not installed.
    """
    if "paddlenlp" in sys.modules:
        return
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        package = importlib.util.module_from_spec(spec)
        sys.modules[name] = package
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, package)
    vars(sys.modules["paddlenlp"])["__version__"] = importlib.metadata.version("paddlenlp")  # its parts ask for it
    for part in ("data", "peft.lora"):  # `data` loads `transformers`; the other way round their circle does not close
        importlib.import_module(f"paddlenlp.{part}")
    for name in _PACKAGES:
        sys.modules[name].__class__ = _Deferred
        del sys.modules[name].__path__
