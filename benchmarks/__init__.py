"""Benchmarks: timings live here, never in tests. Each prints its command's figures with the machine and versions."""
