"""RTSP cameras: source, connection, relay, queue, clock, frame ledger, URL guard.

May use: base, storage, video.
"""
