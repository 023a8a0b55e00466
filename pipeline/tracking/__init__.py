"""What files and cameras share: settings, opening models and streams, tracked objects, commits, memory plan.

May use: detect, detect.lifecycle, tracking.snapshots.
"""
