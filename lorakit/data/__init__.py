"""Examples from files and datasets, as batches with labels."""
