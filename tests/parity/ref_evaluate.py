"""lm-evaluation-harness with its own Hugging Face model: results and every answer, as JSON.

python ref_evaluate.py MODEL TASK_FOLDER NAMES chat|raw OUTPUT
"""

import json
import sys

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

model, folder, names, form, output = sys.argv[1:]
results = simple_evaluate(
    HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=4),
    tasks=names.split(","),
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    apply_chat_template=form == "chat",
    fewshot_as_multiturn=form == "chat",
)
answers = {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}
with open(output, "w", encoding="utf-8") as file:
    json.dump({"results": results["results"], "answers": answers}, file, default=float)
