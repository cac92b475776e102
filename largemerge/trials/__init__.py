"""Compares methods and settings: merges are made, measured, and the best of them kept.

settings.py    what is swept and searched, as a user writes it
check.py       everything that a user gives, looked at before the work; all mistakes at once
make.py        methods and settings → one configuration for each trial
search.py      settings that are proposed, by optuna
held_out.py    tasks of calibration texts, where there is no EVAL.yaml
objective.py   what trials are compared by
folder.py      whose the folder is, and what an earlier run has noted in it
run.py         trials, one after another: merged, measured, noted; what is finished is not done again
results.py     what was found: table, JSON, CSV; page.py, the page
"""
