"""Published weights in and out; ``python -m maetok.hub export`` makes a published folder of a run."""

from maetok.networks.folder import PUBLISHED_FILES, STATISTICS_FILE, published_latent_moments, write_statistics
from maetok.runtime.renamed import renamed

__all__ = ["PUBLISHED_FILES", "STATISTICS_FILE", "published_latent_moments", "write_statistics"]

__getattr__ = renamed(
    "maetok.hub",
    {
        "latent_statistics": "maetok.networks.folder.published_latent_moments",
        "load_tokenizer": "maetok.networks.tokenizer.tokenizer.load_tokenizer",
        "save_tokenizer": "maetok.networks.tokenizer.tokenizer.save_tokenizer",
    },
)
