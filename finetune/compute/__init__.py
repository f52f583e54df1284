"""The mathematics of a step and of a token: layout of a micro-batch, layers, attention, kernels for CPU and GPU,
the decoder.
"""
