"""Masks drawn over pictures: overlay videos and contact sheets.

May use: base, storage, video, tracks.
"""
