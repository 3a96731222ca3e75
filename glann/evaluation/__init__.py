"""Scores of samples against real images: pure functions on arrays, `real=` and `fake=` by name."""
