"""Detected objects: which detections start them, which are of those that are tracked, and when they end.

May use: detect.
"""
