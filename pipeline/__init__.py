"""One stream from source to Parquet: decoding, prompts, tracking, commits, queries and overlays."""
