"""Kernels execute layouts. Each backend module has NAME, supports(), forward() and, some of them, backward()."""
