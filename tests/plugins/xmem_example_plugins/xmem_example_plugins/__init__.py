"""One plugin of each kind, as small as can be."""
