"""Checkpoint folders: found, indexed from headers, read, and written as sharded safetensors.

    read     locate ──► index ──► reader, with lora on top ──► tensor_files ──► direct_io
    write    writer ──► direct_io; side_files

Nothing here knows of merging, of ranks, or of the model's code.
"""
