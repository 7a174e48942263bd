"""Frozen-feature evaluation: extraction, k-NN, linear probes, PCA, reports and figures."""
