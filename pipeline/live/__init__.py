"""One live stream: tracker, requests, record, recovery, recent results; listing of what streams remember.

May use: tracking, draw and zones, what those may use, and live.camera.
"""
