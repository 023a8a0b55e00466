"""One video stream from frames to committed rows: settings, tracker, snapshots, stream record, memory plan.

May use: base, storage, video, tracks, prompts, detect.
"""
