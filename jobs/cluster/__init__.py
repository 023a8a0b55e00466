"""Ray clusters from the client's side: connecting, tokens, errors, local Rays, shipping code.

May use: nothing else of jobs.
"""
