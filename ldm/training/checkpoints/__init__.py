"""Checkpoints: written in the background, renamed into place when complete, verified by SHA-256 before use."""
