"""Snapshots of streams, and what is read from them: their objects, and edits of what they remember.

May use: prompts.
"""
