"""Training on this machine by the operator's own reconciler: pods are process trees."""
