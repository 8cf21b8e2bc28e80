"""What Triton is told about rounding when it compiles a kernel; every launch names one of the two.

Unsaid, it is fused up to Triton 3.9, which warns of that, and is not from 3.10 on.
"""

FUSED = {"enable_fp_fusion": True}  # a product and the addition of it round once
UNFUSED = {"enable_fp_fusion": False}
