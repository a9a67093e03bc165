"""The dataset format: write, index, read and stream tar shards. Knows tensors and bytes; no model, no Ray, no Lightning."""
