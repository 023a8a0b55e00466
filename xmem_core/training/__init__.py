"""Training of the project's own models: clips, losses, trainer. Not needed for published weights."""
