"""Permuting a model's neurons and heads to those of another before they are merged (`align`).

    block ──► units: what may change places without changing what the block computes
    two models' weights ──► matching: the permutations that bring one closest to the other
    reader of a model ──► permuted: the same model, its neurons and heads in other places

Source: Ainsworth, Hayase, Srinivasa 2023, *Git Re-Basin: Merging Models modulo Permutation Symmetries*
(arXiv:2209.04836), weight matching, within blocks.
"""
