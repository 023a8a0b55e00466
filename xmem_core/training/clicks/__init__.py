"""Training of the click model: samples, simulated clicks, the loop. May use `xmem_core.training`."""
