"""Reading of an output folder's Parquet files: their list, which ones a statement needs, many small at once.

May use: tracks.
"""
