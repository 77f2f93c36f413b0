"""Published weights in and out; ``python -m maetok.hub export`` makes a published folder of a run."""

from maetok.networks.folder import PUBLISHED_FILES, STATISTICS_FILE, latent_statistics, write_statistics

__all__ = ["PUBLISHED_FILES", "STATISTICS_FILE", "latent_statistics", "write_statistics"]
