"""Faults on purpose: a plan of what goes wrong when, and what injects it where.

`plan` says it, `drive` does it at the right moment, and two stages know how: `cluster` on a real
cluster of several nodes, `local` on processes of this machine. `recoveries` measures what it cost.
"""
