"""`largemerge demo`: the main job on tiny models made on the spot, offline, in about a minute.

    run.py        the demo as a list of steps: train, configs, merges, table, picture
    corpora.py    three kinds of text that every Python has, and how large everything is
    train.py      a tokenizer, a base, and an expert for each kind of text
    measure.py    losses on text that no model has seen, as a table and as an SVG

It needs nothing but the package's own dependencies.
"""

from largemerge.demo.corpora import DemoSettings
from largemerge.demo.run import run_demo

__all__ = ["DemoSettings", "run_demo"]
