"""How one model is spread over processes: the mesh, tensor parallelism, sharded data parallelism."""
