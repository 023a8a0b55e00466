"""One video file from frames to committed rows: forward, backward, from any frame, and again after an edit.

May use: tracking.
"""
