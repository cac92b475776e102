"""Checkpoint folders: found, indexed from headers, read, and written as sharded safetensors.

Nothing here knows of merging, of ranks, or of the model's code.
"""
