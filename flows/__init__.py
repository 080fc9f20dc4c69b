"""What a user runs. Each flow reads like the table of contents of the pipeline."""
