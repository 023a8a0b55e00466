"""What to track: prompt files, values, boxes turned into masks, index PNGs.

May use: base, storage, video, tracks.
"""
