"""A model and its dials, served: the engine that batches requests, and its faces."""
