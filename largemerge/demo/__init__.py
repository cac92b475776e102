"""`largemerge demo`: the main job on tiny models made on the spot, offline, in about a minute.

    settings.py   how large everything is
    corpora.py    three kinds of text that every Python has
    train.py      a tokenizer, a base, and an expert for each kind (progress.py: how far it is)
    run.py        the demo as a list of steps: train, configs, merges, table, picture
    measure.py    what each model loses on text that none has seen
    picture.py    the losses as an SVG

Needs nothing but the package's own dependencies.
"""

from largemerge.demo.corpora import DemoSettings
from largemerge.demo.run import run_demo

__all__ = ["DemoSettings", "run_demo"]
