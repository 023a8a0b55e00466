"""The annotator: prompts by pointing in a browser, tracked and corrected until the rows are right.

May use: api, exchange and what they may use.
"""
