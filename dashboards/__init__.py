"""Grafana dashboards as Python, and the table of metrics; `python -m dashboards.generate`."""
