"""Sparse ridge regression on the Fisher factor.

The objective, its metric and its refits; hard thresholding, swaps, couplings and natural-gradient steps; and the
solvers of Algorithm 1 and of CHITA.
"""
