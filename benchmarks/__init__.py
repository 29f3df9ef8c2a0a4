"""Benchmarks: each prints JSON, with a straightforward baseline or control beside it."""
