"""Common helpers for files and messages: atomic writes, strict JSON, SHA-256, "did you mean".

Only the standard library is imported here, so that every other package may import it.
"""
