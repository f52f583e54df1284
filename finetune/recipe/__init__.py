"""The recipe: its keys, their rules, reading with every fault at once, writing, the shipped ones."""
