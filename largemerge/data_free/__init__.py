"""Merges without data: every tensor of the output from the same tensor of every model, at the speed of the disk.

config.py         mergekit's YAML               methods/         the table of methods, and their formulas
inputs.py         models, adapters, opened      tasks.py         one task for every output tensor
plan.py           what a merge will do          resources.py     workers and memory
merge.py          a merge as a list of steps    report.py        what it did
engine.py         workers: read, merge, write   loader.py        pieces of a tensor of all models
multi.py          several merges in one file    matrices.py      which tensors are weight matrices
"""
