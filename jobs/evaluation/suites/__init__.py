"""Test suites of composed scenes with exact truth: `xmem evaluate --suite`."""
