"""Flow matching in small parts: path, times, objective, guidance, solvers. The caller passes the denoiser."""

from maetok.flow.guidance import Autoguidance, GuidedVelocity
from maetok.flow.interpolants import CosineInterpolant, Interpolant, LinearInterpolant
from maetok.flow.objective import FlowObjective, MinSNRWeighting, UniformWeighting, Weighting
from maetok.flow.sampling import index_noise, sample
from maetok.flow.solvers import Dopri5, Euler, EulerMaruyama, Heun, Solver, time_grid
from maetok.flow.time_sampling import LogitNormalTime, LogNormalTime, TimeSampling, UniformTime, shift_time

__all__ = [
    "Autoguidance",
    "CosineInterpolant",
    "Dopri5",
    "Euler",
    "EulerMaruyama",
    "FlowObjective",
    "GuidedVelocity",
    "Heun",
    "Interpolant",
    "LinearInterpolant",
    "LogNormalTime",
    "LogitNormalTime",
    "MinSNRWeighting",
    "Solver",
    "TimeSampling",
    "UniformTime",
    "UniformWeighting",
    "Weighting",
    "index_noise",
    "sample",
    "shift_time",
    "time_grid",
]
