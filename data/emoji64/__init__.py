"""The embedded captioned image set: 7,572 emoji pictures of 64 x 64 pixels in two styles.

`train`, `val` and `unseen` beside this file hold the shards; `python -m data.emoji64` builds them.
"""
