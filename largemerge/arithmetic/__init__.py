"""Data-free methods: every tensor of the output from the same tensor of every model, at the speed of the disk.

config.py        the YAML, which is mergekit's
settings.py      what a parameter is for one tensor: numbers, gradients over layers, filters on names
stacks.py        stacks of layers in tensors' names, and slices of them
layout.py        which layers of which models become which layer of the output
tasks.py         one task for every tensor of the output
matrices.py      which tensors are weight matrices, and which way round they are stored
method.py        what a method is
registry.py      the table of methods
literature.py    its rows for methods that mergekit does not have
averages.py      linear, passthrough, nearswap
spheres.py       slerp, nuslerp, multislerp, karcher
task_vectors.py  task arithmetic and its kin: ties, dare, della, breadcrumbs; sce
stock.py         model_stock, arcee_fusion
singular.py      tsv_m, iso_c, iso_cts
continual.py     opcm
covariance.py    wudi, ace
masks.py         consensus_ta, localize_and_stitch, fisher
factors.py       singular vectors and polar factors from Gram matrices
sparsify.py      which elements of a task vector are kept
selection.py     exact thresholds from histograms, without sorting
opening.py       models, adapters, and what belongs to them, opened
pieces.py        a tensor of all models, cut into pieces that are read when wanted
stream.py        reads, merges, writes: one or two workers for every core
turns.py         who computes while others wait for the disk
rescale.py       merges with a factor of the whole model: task vectors first, then the output
holding.py       how many workers, how much kept: what fits into memory
forecast.py      how long it takes
run.py           all parts, shared among ranks and workers
side_files.py    config, tokenizer, model card, report
merge.py         the steps of such a merge, from the config to the report
"""
