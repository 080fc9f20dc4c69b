"""The report of a run: a self-contained ``report.html``, ``report.json``, result tables and an overview picture."""
