"""Merges by the regression methods: the candidates' activations on calibration data decide how linears are merged.

config.py         the YAML                      methods.py         the table of methods
inputs.py         checkpoints, opened           tensor_plan.py     how each output tensor is made
samples.py        calibration data over ranks   weights.py         tensors read and written, as parameters
plan.py           what a merge will do          planning/          memory and time of it
merge.py          a merge as a list of steps    report.py          what it did
engine.py         block after block             passes.py          a block in one or several passes
collect.py        candidates run, sums made     rank_exchange.py   what ranks exchange for a block
gram.py           XᵀX                           group_sums.py      Gram and right-hand side
gram_run.py       XᵀX written for later         gram_files.py      and read in place of data
solve.py          the anchored solve            averages.py        all other tensors
"""
