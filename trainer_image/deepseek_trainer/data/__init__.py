"""Corpora: what a model reads, how it is prepared and in which order it is read."""
