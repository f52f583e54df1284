"""GGUF files as models: the container, its tensors as a stream, and what its metadata says of model and tokenizer.

No paddle here.
"""
