"""Files, digests and messages as all packages write and read them: atomic writes, strict JSON, sha256, "did you mean".

Only the standard library is imported here, so that everything else may import it.
"""
