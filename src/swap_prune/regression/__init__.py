"""Sparse ridge regression on the Fisher factor: objective and refit, hard thresholding, the paper's step."""
