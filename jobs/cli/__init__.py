"""The `xmem` command: one module per command.

May use: every room of jobs.
"""
