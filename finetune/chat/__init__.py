"""Text to token ids and the mask of what is trained on: messages, tokenizer, chat template. The same rendering for
all commands.
"""
