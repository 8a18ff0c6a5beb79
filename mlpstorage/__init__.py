"""Benchmark suite for the storage of AI systems."""

__version__ = "0.3.0"
