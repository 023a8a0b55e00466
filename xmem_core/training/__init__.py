"""Training of models of our own: clips, losses, trainer. The published weights need none of it."""
