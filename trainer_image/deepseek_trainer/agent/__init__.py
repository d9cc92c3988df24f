"""What lives in the torchrun process of a worker pod: rendezvous, beats, metrics, reports."""
