"""A run from a recipe to its folder: memory estimate, loop, optimizer, checkpoints, resuming; preference training;
several processes.
"""
