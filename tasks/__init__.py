"""Thin Prefect adapters around the stages of ``ddsr_core``: cache keys, retries, results, artifacts. No maths."""
