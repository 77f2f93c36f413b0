"""Freed memory stays with the process, so that the next tensor of that size costs no page faults."""

import os
import subprocess
import sys

CODE = """
import resource, sys, torch
from maetok.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use_memory():
    return [torch.ones(2**21) for _ in range(8)]  # 8 MiB each, all freed on return
for _ in range(3):
    use_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use_memory()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(argument: str) -> int:
    # glibc raises its threshold while a process runs, and what it does then depends on how the heap happens to lie;
    # with the initial threshold held fixed, every tensor is mapped anew unless the process asks for something else
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    command = [sys.executable, "-c", CODE, argument]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(result.stdout)


def test_memory_that_was_used_before_causes_no_page_faults() -> None:
    assert page_faults("keep") < 100 < page_faults("default")
