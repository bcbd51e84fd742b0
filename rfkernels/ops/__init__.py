"""The kernel API: one module per op with its checks, its specification (the docstrings), dispatch and gradients."""
