"""Memory of a process is what the kernel says elsewhere."""

import resource
import subprocess
import sys

import numpy as np
import pytest

from maetok.runtime.memory import process_memory


def test_peak_of_this_process_is_that_of_getrusage() -> None:
    expected = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert process_memory("VmHWM") == pytest.approx(expected, rel=0.02)


def test_present_memory_follows_what_is_held() -> None:
    before = process_memory("VmRSS")
    held = np.ones(2**24)  # 128 MiB
    assert process_memory("VmRSS") - before == pytest.approx(held.nbytes, rel=0.05)


def test_another_process() -> None:
    command = [sys.executable, "-c", "data = b'x' * 2**26; input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            while (process_memory("VmHWM", process.pid) or 0) < 2**26:
                assert process.poll() is None
        finally:
            process.communicate(b"\n")
    assert process_memory("VmHWM", process.pid) is None
