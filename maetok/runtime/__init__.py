"""The process and its machine: distributed helpers, CPU settings, memory, FLOPs."""
