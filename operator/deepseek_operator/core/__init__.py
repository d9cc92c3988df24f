"""Decisions only. Nothing here does I/O, reads a clock, draws a random number or imports a client."""
