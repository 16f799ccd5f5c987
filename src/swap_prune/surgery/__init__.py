"""The only package that changes a model: its weights, and BatchNorm's statistics; and how it is given back."""
