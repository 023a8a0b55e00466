"""Batch jobs: manifests, the Ray pool, leases, submission and reports.

May use: scheduling, cluster.
"""
