"""A factory that prints, as ``tests.chatty:network``."""

from __future__ import annotations

from torch import nn

from tests import tiny


def network() -> nn.Module:
    print("building the network")
    return tiny.network()
