"""How one model is spread over processes: mesh, tensor parallelism, sharded data parallelism."""
