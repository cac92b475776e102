"""Vocabularies: the tokenizer of the output, and which rows of every model's embeddings its tokens are.

settings.py    what the configuration says
tokenizers.py  tokenizers in folders: their tokens, their files
union.py       one tokenizer with the tokens of several
build.py       from the settings and the models to the output's vocabulary
embeddings.py  which tensors have a row for every token
rules.py       what happens with tokens that a model lacks
rows.py        reads rows of embeddings in the order of the output's tokens
ids.py         token numbers in config.json, where tokens have moved
templates.py   chat templates
"""
