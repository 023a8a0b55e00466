"""One live stream: tracker, requests, record, recovery, recent results.

May use: memory, zones, what those may use, and live.camera.
"""
