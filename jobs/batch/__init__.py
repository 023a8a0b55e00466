"""Batch jobs: manifests, the Ray pool, submission and reports.

May use: scheduling, cluster.
"""
