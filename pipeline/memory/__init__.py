"""What a stream remembers, of files and cameras: lists it, edits it, tells which frames a mask was read from.

May use: tracking.files, draw.
"""
