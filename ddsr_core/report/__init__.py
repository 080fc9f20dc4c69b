"""The report of a run: one self-contained ``report.html``, ``report.json``, result tables and an overview picture."""
