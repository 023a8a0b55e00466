"""Detectors, which find objects without prompts: their protocol, the built-in ones, and loading by name.

May use: base, storage, video, tracks, prompts.
"""
