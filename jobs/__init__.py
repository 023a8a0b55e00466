"""Many streams: batch jobs, evaluation, training runs, and the `xmem` command."""
