"""Many live streams in one process: hub, capacity, registry, status.

May use: live and what it may use.
"""
