"""Configurations of fastmerge's methods for FusionBench: `hydra.searchpath=[pkg://` this package `]`."""
