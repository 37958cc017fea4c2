"""Read captioned image shards in a reproducible order, and write them.

Of this project, only ldm.errors and ldm.files are imported here; the tokenizer is passed in as a callable.
"""
