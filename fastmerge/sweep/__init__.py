"""Sweeps: candidates of a merge config, a grid or a list, scored one after the other from one read of the models."""
