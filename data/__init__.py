"""Captioned image shards: reading them in a reproducible order, and writing them.

Nothing here imports another package of this project; the tokenizer is handed in as a callable.
"""


class DataError(Exception):
    """Something is wrong with the data itself (a shard, a sample), not with how it was asked for."""
