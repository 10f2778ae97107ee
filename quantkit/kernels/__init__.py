"""Dual-path GEMM kernels: device code by architecture prefix, chosen and launched from here.

`capability` is the table of what runs where, `dispatch` picks a row for a packed linear and
reports it, `generate` fills in template arguments, `jit` compiles.
"""


def report() -> dict[str, dict[str, str]]:
    """Return, for each site prepared in this process, its formats, the kernel that ran, and why."""
    from quantkit.kernels import dispatch

    return dispatch.report()
