"""Ray clusters as a client sees them: connecting, tokens, errors, a Ray of our own, shipping the code.

May use: nothing else of jobs.
"""
