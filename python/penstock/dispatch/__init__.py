"""Paged tensors where torch dispatches operations, and what reads tensors without asking it.

The library in C++ (`csrc/torch_dispatch`) is built and loaded here, and torch's own readers of
memory (arrays, pickles, DLPack) are given copies. Kernels that take addresses find the bytes there.
May import the ground alone. Thread-safe: the library is loaded once, and torch's functions are
replaced once, for the life of the process.
"""
