"""Adapters that are written: the difference of two models, and several adapters as one.

extract.py          the list of steps of `extract-lora`: open, compare, plan, decompose, write
differences.py      two checkpoints, parameter by parameter, under the names of the fine-tuned model's class
report.py           what an extracted adapter keeps of the difference, by rank, and what it does not hold
merge.py            the list of steps of `merge-adapters`
merge_config.py     its configuration
factor_methods.py   the table of its methods, and their maths
peft_files.py       what peft calls tensors and modules; `adapter_config.json`
folder.py           the output folder
"""
