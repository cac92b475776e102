"""Adapters that are written: extracted as the difference of two models.

differences.py   two checkpoints, parameter by parameter, under the names of the fine-tuned model's class
peft_files.py    what peft calls them: names of tensors, modules to save, `adapter_config.json`
extract.py       the list of steps: open, compare, plan, decompose, write
report.py        what the adapter keeps of the difference, by rank, and what it does not hold
"""
