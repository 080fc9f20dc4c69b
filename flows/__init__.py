"""What a user runs. Each flow reads like the pipeline's table of contents."""
