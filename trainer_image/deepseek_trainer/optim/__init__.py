"""The optimizer step: one reduction that all ranks decide by, clipping, loss scale, AdamW."""
