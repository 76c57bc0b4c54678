"""liger: turn softmax-attention language models into gated linear recurrent ones (arXiv 2503.01496)."""

__version__ = "0.1.0"
