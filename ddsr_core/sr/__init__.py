"""Super-resolution networks (section III): how they are built, trained, saved, loaded and run."""
