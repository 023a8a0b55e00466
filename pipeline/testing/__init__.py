"""Conformance checks for authors of plugins: sources, box segmenters, detectors and sinks.

May use: every room of pipeline but distributed.
"""
