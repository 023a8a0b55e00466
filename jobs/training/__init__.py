"""Training runs: the published stages of XMem, and recipes of small models.

Uses the evaluation, `jobs.cluster` for Ray, and `xmem_core.training`.
"""
