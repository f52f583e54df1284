"""Benchmarks of a model with EleutherAI's lm-evaluation-harness: MMLU, HumanEval, GSM8K, C-Eval, IFEval, more."""
