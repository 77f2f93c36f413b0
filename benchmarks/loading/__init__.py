"""How fast shards, latents and shuffles are read, as ratios."""
