"""Many processes that share one merge.

    ranks.py           the processes, and how they agree
    partition.py       batches and solves over ranks
    collectives.py     reduce and broadcast, in the background
    shared_memory.py   tensors that ranks of one machine share
    watchdog.py        ranks that die, fail or hang are noticed

Nothing here knows of merging.
"""
