"""One block of any Transformers model, run on its own: the model's code without its weights, and what it reads.

skeleton.py        the model on the meta device     trace.py           what a forward pass reads
forward.py         a forward pass up to one block   fake_forward.py    forward passes with made-up weights
block_runner.py    a block run on hidden states     hidden_states.py   hidden states between blocks
key_mapping.py     names on disk and in the module

Nothing here knows of merging.
"""
