"""Training and passes on several processes."""
