"""Compares methods and settings: merges are made, measured, and the best of them kept.

trials.py    methods, swept and searched settings → one configuration for each trial
run.py       trials, one after another: merged, measured, noted; what is finished is not done again
results.py   what was found: table, JSON, CSV, page
"""
