"""The paper's comparison of latent spaces on digits: ``python -m tools.study``."""
