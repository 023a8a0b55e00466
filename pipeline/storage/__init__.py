"""Bytes on local disks and fsspec file systems: create-only writes, retries, locations.

May use: base.
"""
