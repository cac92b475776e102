"""One block of any Transformers model, run on its own: the model's code without its weights, and what it reads.

Nothing here knows of merging.
"""
