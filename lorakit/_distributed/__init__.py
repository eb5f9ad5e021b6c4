"""Passes and trainings on several processes: sharded loaders and sharded weights."""
