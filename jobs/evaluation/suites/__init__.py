"""Test suites of composed scenes with exact truth: `xmem evaluate --suite`.

May use: evaluation, and `xmem_core.training.clicks` for simulated clicks.
"""
