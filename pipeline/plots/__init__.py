"""Plots of one stream's tracks: timeline, trajectories, heat map, measures over time, and a report in HTML.

May use: base, storage, tracks, video, draw, zones, analytics.
"""
