"""One minimal plugin of each kind."""
