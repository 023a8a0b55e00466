"""Evaluation on labelled data sets.

May use: nothing else of jobs.
"""
