"""Detectors, which start objects without prompts, and the lifecycle of the objects they found.

May use: base, storage, video, tracks, prompts.
"""
