"""Memory and time of a config on GPUs, before it runs: ``python -m tools.plan``."""
