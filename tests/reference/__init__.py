"""Slow, plainly right implementations to compare with."""
