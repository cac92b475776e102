"""Data-free methods: every tensor of the output from the same tensor of every model, at the speed of the disk.

config.py        the YAML, which is mergekit's
settings.py      what a parameter is for one tensor: numbers, gradients over layers, filters on names
stacks.py        stacks of layers in tensors' names, and slices of them
layout.py        which tensors of which models become which tensor of the output
registry.py      the table of methods
averages.py      linear, passthrough, nearswap
spheres.py       slerp, nuslerp, multislerp, karcher
task_vectors.py  task arithmetic and its kin: ties, dare, della, breadcrumbs; sce
stock.py         model_stock, arcee_fusion
sparsify.py      which elements of a task vector are kept
selection.py     exact thresholds from histograms, without sorting
pieces.py        a tensor of all models, cut into pieces that are read when wanted
stream.py        reads, merges, writes: one worker for every core
side_files.py    config, tokenizer, model card, report
merge.py         the steps of such a merge, from the config to the report
"""
