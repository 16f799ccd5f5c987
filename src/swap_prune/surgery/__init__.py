"""What pruning changes of a model, written and given back: the selected weights, and BatchNorm's statistics."""
