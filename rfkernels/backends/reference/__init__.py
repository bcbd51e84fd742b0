"""Eager torch: the meaning of every op, and the fallback where no kernel serves.

The functions follow the formulas of the op docstrings product by product and sum by sum, in the compute type (float64 for
float64 inputs, else float32), so a kernel can be held to them bit for bit. They are differentiable torch code and run
under every torch transform.
"""
