"""Captioned image shards: reading them in a reproducible order, and writing them.

Nothing here imports another package of this project but ldm.errors and ldm.files; the tokenizer is handed in as a
callable.
"""
