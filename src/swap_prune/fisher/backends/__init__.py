"""The back ends of a FisherFactor beside the dense one: 16 bits, a file, outer products, columns of other processes."""
