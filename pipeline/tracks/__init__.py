"""The output folder: masks, file layout, chunk files, the store, readers and sinks.

May use: base, storage.
"""
