"""Calibration: scores become probabilities, and a threshold with a guarantee."""
