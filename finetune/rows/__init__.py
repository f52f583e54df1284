"""Data files to packed examples: sources, forms of rows, encoding by several processes, cache, streams, the plan of
an epoch, preview.
"""
