"""Tracks in the formats of other tools: export of output folders, import into them.

May use: prompts and what it may use.
"""
