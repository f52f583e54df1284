"""A model written for other programs (Hugging Face, PaddleNLP, PEFT, GGUF), read back and compared."""
