"""Permuting a model's neurons, heads and features to those of another before they are merged (`align`).

    block, between its linears ──► finding: units, what may change places without changing what the block computes
    model, between all matrices (outer) ──► streams: the dimensions that are a residual stream ──► stream_tensors
    two models' weights ──► matching: the permutations that bring one block closest to the other
                        ──► descent: blocks and residual streams in turn
    reader of a model ──► permuted: the same model, its neurons, heads and features in other places

Source: Ainsworth, Hayase, Srinivasa 2023, *Git Re-Basin: Merging Models modulo Permutation Symmetries*
(arXiv:2209.04836), weight matching.
"""
