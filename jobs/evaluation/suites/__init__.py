"""Scenes composed from stills, with exact truth, and what a model makes of them: `xmem evaluate --suite`."""
