"""Dual-path GEMM kernels: device code by architecture prefix, chosen and launched from here."""
