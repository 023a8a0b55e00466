"""Ray: tracker actors and their messages, the Serve application, the Ray Data stage.

May use: every room of pipeline but testing.
"""
