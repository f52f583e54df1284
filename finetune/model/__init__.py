"""A model on disk and in memory: found, checked against its config, converted, loaded, given an adapter, written.
Paddle's bring-up.
"""
