"""Frames of video files and image folders: decoding, packet index, exact seeking, prefetching.

May use: base, storage.
"""
