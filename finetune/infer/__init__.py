"""Prompts to answers: the decoding engine, sampling, and the commands `generate` and `chat`."""
