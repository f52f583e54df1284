"""One process of a distributed run: `python -m finetune.train.processes.worker RECIPE FOLDER`, started by launch.py."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

from finetune.errors import FinetuneError, Interrupted
from finetune.infer.samples import answer
from finetune.recipe.load import load_recipe
from finetune.train.processes.launch import STOPPED_UNSAVED
from finetune.train.processes.parallel import world_from_environment
from finetune.train.run import train


def main() -> int:
    """Train; leave an error where the parent finds it."""
    recipe, folder = sys.argv[1], Path(sys.argv[2])
    try:
        train(load_recipe(recipe), answer=answer)
    except FinetuneError as error:
        return _report(folder, error.exit_code, str(error), stopped=isinstance(error, Interrupted))
    except KeyboardInterrupt:
        return _report(folder, 1, STOPPED_UNSAVED, stopped=True)
    except Exception as error:  # the parent shows it; nothing is lost
        return _report(folder, 1, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return 0


def _report(folder: Path, exit_code: int, text: str, *, stopped: bool = False) -> int:
    report = {"exit_code": exit_code, "text": text, "stopped": stopped, "time": time.time()}
    path = folder / f"error-{world_from_environment().rank}.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    return exit_code


def end() -> None:
    """Run `main` and leave at once: a rank that tears gloo down while another has left already may abort."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end()
