"""Readers for the published correspondence benchmarks, in the folder layouts in which they are released."""
