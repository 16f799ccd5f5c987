"""One stage after another: what a stage does, what it asks the network, and how many stages there are to be."""
