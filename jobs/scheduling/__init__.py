"""The batch scheduler: pure logic, without Ray, threads or clocks.

May use: nothing else of jobs.
"""
