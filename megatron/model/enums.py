"""The kinds of networks, of layers and of masks."""

from enum import Enum, auto


class ModelType(Enum):
    """Whether a network is one stack of layers, or an encoder with a decoder behind it."""

    encoder_or_decoder = auto()
    encoder_and_decoder = auto()


class LayerType(Enum):
    """Whether a layer also attends to what an encoder has made."""

    encoder = auto()
    decoder = auto()


class AttnMaskType(Enum):
    """Whether a query sees all keys that are not padding, or of them those not ahead of it."""

    padding = auto()
    causal = auto()
