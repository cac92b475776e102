"""The tokenizer of an output: united, extended or copied, and which rows of embeddings its tokens get."""
