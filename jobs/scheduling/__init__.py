"""The batch scheduler and what it decides with: pure logic, without Ray, threads or clocks.

May use: nothing else of jobs.
"""
