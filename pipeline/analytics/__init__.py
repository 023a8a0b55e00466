"""Queries over mask tracks: SQL over output folders, and result formats.

May use: analytics.scan, zones.
"""
