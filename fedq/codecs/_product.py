"""Matrix products that every machine rounds alike."""

from __future__ import annotations

from fedq.jit import jit


@jit
def accumulate(p, q, out):  # type: ignore[no-untyped-def]
    """Add the product of two float32 matrices: ``out[i, j] += sum over k of p[i, k] q[k, j]``.

    Terms are added to ``out[i, j]`` one by one, k ascending, and each product and each sum is
    rounded to float32: no BLAS, no reordering, no fused multiply-add. The inner loop runs over
    independent j, which the compiler makes SIMD instructions of.

    Args:
      p: (rows, inner) float32.
      q: (inner, columns) float32, contiguous.
      out: (rows, columns) float32, contiguous; changed in place.
    """
    for i in range(p.shape[0]):
        for k in range(p.shape[1]):
            factor = p[i, k]
            for j in range(q.shape[1]):
                out[i, j] += factor * q[k, j]
