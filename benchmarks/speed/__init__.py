"""Speed of networks and sampling beside plain references, as ratios."""
