"""Estimates the cost and memory of a run: FLOPs and memory counted on fake tensors, seconds from measured rates."""
