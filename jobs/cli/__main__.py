"""`python -m jobs.cli`: the `xmem` command."""

from jobs.cli.app import main

main()
