"""Prefect around the stages of ``ddsr_core``: cache keys, retries, results, pages in the UI. No mathematics."""
