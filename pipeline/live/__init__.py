"""One live stream: tracker, requests, record, recovery, recent results.

May use: tracking and draw, what those may use, and live.camera.
"""
