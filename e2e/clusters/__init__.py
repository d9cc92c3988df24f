"""Real Kubernetes clusters of several nodes on this machine, for tests.

`providers.choose(name)` gives a `Cluster` (interface.py); `images.build(target)` builds what is
loaded into it; `python -m e2e.clusters --help` is the same from a shell.
"""
