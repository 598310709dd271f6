"""Loaders that users would pick instead, each a small script run in an environment of its own.

They share nothing with the package but how they are measured: `PYTHONPATH=pipeline/benchmark python -m peers.NAME
JSON` prints one line of JSON. Each does what its documentation shows for training, in the fastest form that a
good user would write: whole pictures to uint8 RGB, mirrored at random, batches as one tensor (B, H, W, 3).
"""
