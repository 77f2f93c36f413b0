"""Tasks: thin wiring around maetok; classes named in configs are importable from here."""

from lightning_modules.schedules import ConstantWithWarmup, CosineWithWarmup
from lightning_modules.tokenizer import TokenizerTraining

__all__ = ["ConstantWithWarmup", "CosineWithWarmup", "TokenizerTraining"]
