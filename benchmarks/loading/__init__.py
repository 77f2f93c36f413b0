"""Speed of reading images and latents, and quality of shuffles, as ratios to reference loaders."""
