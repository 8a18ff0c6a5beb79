"""Measuring: histograms, the measured window, and what the client itself costs."""
