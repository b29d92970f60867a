"""Training of BERT, GPT and T5 models that are too large for one device."""

__version__ = "0.1.0"
