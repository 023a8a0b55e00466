"""Zones and lines over mask tracks: the `zones.json` file, and one engine for files and live streams.

May use: base, storage, tracks.
"""
