"""Errors, records, redaction, stream ids and plugin loading: what every room builds on.

Uses no other room.
"""
