"""Training runs: the published stages of XMem, and recipes of small models.

Uses the evaluation and `xmem_core.training`.
"""
