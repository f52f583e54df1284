"""Tasks of lm-evaluation-harness over rows made on the spot: multiple choice, answers of several tokens, generation,
whole texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = ("sums_choice", "sums_text", "sums_answer", "sums_whole")
_LETTERS = "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"
_FORMS = {
    "sums_choice": f"""
output_type: multiple_choice
fewshot_split: test
fewshot_config: {{sampler: first_n}}
num_fewshot: 3
doc_to_text: "{_LETTERS}"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
    "sums_text": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "sums_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e", "\\n\\n"], do_sample: false, max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "sums_whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{whole}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(folder: Path, count: int = 30) -> Path:
    """Task files and their rows; returns the folder for `--include`. Some `whole` texts exceed 512 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    rows = []
    for index in range(count):
        a, b = draw.randint(1, 40), draw.randint(1, 40)
        choices, answer = [a + b, a + b + 1, a + b - 1, 2 * a], draw.randrange(4)
        choices[0], choices[answer] = choices[answer], choices[0]
        question = f"What is the sum of {a} and {b}?"
        whole = " ".join(f"The sum of {a} and {n} is {a + n}." for n in range(1 + 40 * (index % 5 == 0)))
        rows.append({"question": question, "choices": [str(c) for c in choices], "answer": answer, "whole": whole})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, form in _FORMS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + form + "metadata: {version: 1.0}\n", encoding="utf-8")
    return folder
