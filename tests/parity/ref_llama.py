"""Answers by llama.cpp, as built into the xllamacpp wheel. Runs in the reference environment only.

    python ref_llama.py JOB.json ANSWER.json

JOB.json: {files: GGUF paths, texts, messages, prompts: lists of token ids, new_tokens}. ANSWER.json holds, per file,
    tokens    of each text, markers such as <|im_start|> read as such
    rendered  the messages in the file's chat template, with the header of an answer
    greedy    new tokens of each prompt
    first     of each prompt, the five likeliest first tokens, likeliest first: {id: log-probability}
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp


def answer(path: str, job: dict) -> dict:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.port, params.warmup, params.verbosity = 512, 1, 0, False, 0
    # As it comes, keys and values are float16, and so is attention.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def ask(route: str, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    settings = {"n_predict": job["new_tokens"], "temperature": 0, "n_probs": 5, "return_tokens": True}
    settings |= {"ignore_eos": True, "cache_prompt": False}
    completions = [ask("/completion", {"prompt": prompt, **settings}) for prompt in job["prompts"]]
    firsts = [completion["completion_probabilities"][0]["top_logprobs"] for completion in completions]
    return {
        "tokens": [ask("/tokenize", {"content": text, "parse_special": True})["tokens"] for text in job["texts"]],
        "rendered": ask("/apply-template", {"messages": job["messages"]})["prompt"],
        "greedy": [completion["tokens"] for completion in completions],
        "first": [{top["id"]: top["logprob"] for top in first} for first in firsts],
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = [answer(path, job) for path in job["files"]]
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
