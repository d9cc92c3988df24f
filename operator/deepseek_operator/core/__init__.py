"""Decisions only: no I/O, no clock, no random number, no client."""
