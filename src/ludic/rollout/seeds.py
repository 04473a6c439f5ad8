"""Where every random number of a run comes from: a seed that is derived from the run's, and from what it is for."""

import hashlib


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2^62) that depends on every part, e.g. (run seed, step, prompt).

    Example:
        >>> derive_seed(0, 3, 1) == derive_seed(0, 3, 1) != derive_seed(0, 1, 3)
        True
    """
    digest = hashlib.blake2b(b",".join(str(part).encode() for part in parts), digest_size=8).digest()
    return int.from_bytes(digest) >> 2
