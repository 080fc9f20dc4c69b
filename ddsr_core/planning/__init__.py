"""What a run will cost and whether it fits, before it runs: FLOPs and memory counted on fake tensors, seconds from rates."""
