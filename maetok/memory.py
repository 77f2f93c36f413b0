"""How the C library treats memory that tensors on the CPU no longer need."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Numbers of the parameters of ``mallopt`` in glibc's ``malloc.h``."""


def keep_freed_memory(limit_megabytes: int = 2000) -> bool:
    """Let the process keep freed memory for the next tensors instead of giving it back after every operation.

    By default glibc maps each large tensor anew, and the kernel fills all its pages with zeros first: in guided
    sampling of 250 digits that is a quarter of the time. Nothing is computed differently.

    Args:
        limit_megabytes: free memory above this is given back.

    Returns:
        Whether the C library could be told; only glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    largest_heap_block = 32 * 2**20  # glibc takes no more
    return bool(mallopt(MMAP_THRESHOLD, largest_heap_block)) and bool(mallopt(TRIM_THRESHOLD, limit_megabytes * 2**20))
