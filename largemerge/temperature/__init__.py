"""The softmax temperature of a model, fitted by likelihood and folded into its weights.

run.py      the list of steps of `temperature`: prepare, measure, fit, measure again, write; and its report
curve.py    the likelihood as a function of the temperature, its minimum, and calibration errors
folding.py  which tensors scale the logits
"""
