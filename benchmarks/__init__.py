"""Figures of this machine, side by side in one run: `python -m benchmarks [NAME ...]`."""
