"""Checkpoint folders: found, indexed from headers, read, and written as sharded safetensors.

    read     locate ──► index ──► reader, with lora on top ──► tensor_files ──► direct_io
             (weight_files: which files; sentence_modules: those beside the transformer; quantized, float8)
    write    writer ──► direct_io; side_files

Nothing here knows of merging, of ranks, or of the model's code.
"""
