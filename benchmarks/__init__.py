"""`pytest benchmarks/`: every op and the whole system, against peers and the machine's limits."""
