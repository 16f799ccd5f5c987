"""A network as it is run: in which mode and layout, on which device, with which weights."""
