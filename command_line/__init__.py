"""What `main.py` does to files and flags before jsonargparse checks their types: old keys and interpolation."""

from command_line.cli import InterpolatingCLI
from command_line.interpolation import Shared

__all__ = ["InterpolatingCLI", "Shared"]
