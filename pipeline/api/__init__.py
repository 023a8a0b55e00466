"""The HTTP API over live streams: application, models, guard, tokens, and the page it serves.

May use: live.hub and what it may use.
"""
