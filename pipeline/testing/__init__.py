"""Checks that authors of plugins run: sources, box segmenters, detectors and sinks.

May use: every room of pipeline but distributed.
"""
