"""Tests of the suite; processes that they start together wait for gloo before they end."""

from maetok.runtime.distributed import linger_at_exit

linger_at_exit()
