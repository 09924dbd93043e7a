"""The kernel families in plain PyTorch: the definition that every other backend is held to, bit for bit.

Knows only torch. Each file is meant to be read beside the formula that it states; clarity comes before speed.
"""
