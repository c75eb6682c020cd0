"""Experiments and benchmarks: one question per file, one table per file."""
