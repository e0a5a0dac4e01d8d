"""Measurements: kernels on seeded workloads, whole models, and the result files they write."""
