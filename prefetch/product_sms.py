"""How many SMs cuBLAS may count on for its products.

On compute capability 9 cuBLAS starts as many CTAs as the GPU has SMs, each of which
works on one tile after another. On fewer SMs the last CTAs begin when the first
are through, so that a product takes twice as long; told the number, cuBLAS starts as
many as there is room for.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ALL = 0  # cuBLAS: "when set to 0, the library returns to its default behavior"


@contextmanager
def products_on(sms: int) -> Iterator[None]:
    """Products that this thread launches meanwhile count on `sms` SMs, ALL: on all there are.

    Needs the cuBLAS that torch has loaded; does nothing where there is none. RuntimeError
    when cuBLAS refuses.
    """
    version = torch.version.cuda
    if sms == ALL or version is None:
        yield
        return
    cublas = ctypes.CDLL(f"libcublas.so.{version.split('.')[0]}")  # the one that torch has loaded
    set_target(cublas, sms)
    try:
        yield
    finally:
        set_target(cublas, ALL)


def set_target(cublas: ctypes.CDLL, sms: int) -> None:
    status = cublas.cublasSetSmCountTarget(ctypes.c_void_p(torch.cuda.current_blas_handle()), sms)
    if status != 0:
        raise RuntimeError(f"cublasSetSmCountTarget: status {status}")
