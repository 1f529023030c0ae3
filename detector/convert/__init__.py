"""Detectors that other toolkits trained, as checkpoints of ours.

`docs/weights.md` lists where conventions differ.  Nothing in a weights file is executed, and every tensor of it is
accounted for.
"""
