"""Callbacks that keep masks in other people's training loops; each module needs an extra of its own."""
