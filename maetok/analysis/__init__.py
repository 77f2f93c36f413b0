"""Analysis of latent spaces."""

from maetok.analysis.accuracy import Accuracy
from maetok.analysis.gmm import MixtureFit, fit_mixtures
from maetok.analysis.linear_probe import linear_probe_accuracy
from maetok.analysis.modes import ModeAnalysis, analyse_modes
from maetok.analysis.neighbours import neighbour_accuracy
from maetok.analysis.projection import PrincipalComponents

__all__ = [
    "Accuracy",
    "MixtureFit",
    "ModeAnalysis",
    "PrincipalComponents",
    "analyse_modes",
    "fit_mixtures",
    "linear_probe_accuracy",
    "neighbour_accuracy",
]
