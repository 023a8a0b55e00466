"""An output folder's rows as tables of Delta Lake, Iceberg and DuckLake.

May use: analytics.scan.
"""
