"""Checkpoints: config.json, tensors, families, and the teacher that is made of them."""
