"""Zones and lines over mask tracks: their file, and one incremental engine for files and live streams.

May use: base, storage, tracks.
"""
