"""VSF's attention as one Triton kernel: nothing leaves it but the result. ``fused.py`` launches it.

The forward pass of FlashAttention-2 (arXiv 2307.08691) over keys in an order of its own. A tile of queries lies inside
one group, so that all of it sees the same keys:

======= ================================================== ======================================================
queries VSF                                                NAG, NASA, ONG (``two``)
======= ================================================== ======================================================
I       I, P, then N: logits less beta, times -alpha       I; from there P makes Z+, and from there N makes Z-
P       I, P                                               I, P
N       I, N                                               I, N
======= ================================================== ======================================================

The log-sum-exps that a merge needs are the online softmax's own: 1 - W = l_N / l. Not the values but the probabilities
are multiplied by -alpha, in fp32: no copy of V is made, and none overflows. In cross-attention P is all the positive
keys, and there are neither image keys nor queries of text.
"""

import triton
import triton.language as tl

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: N803, N806, SIM102 (Triton: pointers and constants in capitals; what is known at compile time decided alone)

LOG2_E = tl.constexpr(1.4426950408889634)
"""Logits are to base 2 here, for exp2."""


@triton.jit
def _step(acc, norm, peak, logits, v, weight, OPERAND: tl.constexpr):
    """Online softmax: the keys of ``logits`` and ``v`` join, each with a ``weight`` on its value."""
    new = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # while all keys are hidden
    kept, p = tl.exp2(peak - base), tl.exp2(logits - base[:, None])
    weighted = (p * weight).to(v.dtype).to(OPERAND)
    acc = tl.dot(weighted, v.to(OPERAND), acc * kept[:, None], input_precision="ieee")
    return acc, norm * kept + tl.sum(p, 1), new, kept, tl.sum(p, 1)


@triton.jit
def _over(
    acc, norm, peak, q, K, V, Mask, k_row, v_row, start, stop, scale,
    WHOLE: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The positive keys from ``start`` to ``stop`` join; WHOLE: they are whole tiles."""
    key, d = tl.arange(0, KEYS), tl.arange(0, DIM)[None, :]
    k_tile, v_tile = key[:, None] * k_row + d, key[:, None] * v_row + d
    for first in range(start, stop, KEYS):
        at, inside = tl.cast(first, tl.int64), key < stop - first
        k_at, v_at = K + at * k_row + k_tile, V + at * v_row + v_tile
        if WHOLE and D == DIM:
            k, v = tl.load(k_at), tl.load(v_at)
        else:
            there = inside[:, None] & (d < D)
            k, v = tl.load(k_at, mask=there, other=0.0), tl.load(v_at, mask=there, other=0.0)
        logits = tl.dot(q, tl.trans(k.to(OPERAND)), input_precision="ieee") * scale
        if Mask is not None:
            logits += tl.load(Mask + at + key, mask=inside, other=0.0).to(tl.float32)[None, :] * LOG2_E
        if not WHOLE:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        acc, norm, peak, _, _ = _step(acc, norm, peak, logits, v, 1.0, OPERAND)
    return acc, norm, peak


@triton.jit
def _store(Out, out_row, acc, norm, row, inside, D: tl.constexpr, DIM: tl.constexpr):
    z = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    d = tl.arange(0, DIM)[None, :]
    at = Out + row.to(tl.int64)[:, None] * out_row + d
    tl.store(at, z.to(Out.dtype.element_ty), mask=inside[:, None] & (d < D))


LENGTHS = ("heads", "negative", "before", "rest", "image", "rows", "image_keys", "keys")
SMALL_STRIDES = ("mask_b", "padding_b", "alpha_b", "alpha_n", "beta_b", "beta_i", "beta_n")


@triton.jit(do_not_specialize=[*LENGTHS, *SMALL_STRIDES])
def attention_kernel(
    Q, K, V, KN, VN, Mask, MaskN, Padding, Alpha, Beta, Out, OutN, Share,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, kn_b, kn_h, kn_row, vn_b, vn_h, vn_row,
    out_b, out_h, out_row, outn_b, outn_h, outn_row,
    mask_b, padding_b, alpha_b, alpha_n, beta_b, beta_i, beta_n,
    heads, negative, before, rest, image, rows, image_keys, keys, scale,
    D: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, NEGATIVES: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    tile, b, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    b, h = b.to(tl.int64), h.to(tl.int64)
    # which group: image tiles first, since they take the longest
    first, stop = image + tile * QUERIES, rows
    is_image, is_negative = first < rows, False
    if not is_image:
        left = tile - tl.cdiv(rows - image, QUERIES)
        of_first, of_n = tl.cdiv(before, QUERIES), tl.cdiv(rest - before, QUERIES)
        is_negative = (left >= of_first) & (left < of_first + of_n)
        if left < of_first:
            first, stop = left * QUERIES, before
        elif is_negative:
            first, stop = before + (left - of_first) * QUERIES, rest
        else:
            first, stop = rest + (left - of_first - of_n) * QUERIES, image
    row, d = first + tl.arange(0, QUERIES), tl.arange(0, DIM)
    inside = row < stop
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    if Mask is not None:
        Mask += b * mask_b
    scale *= LOG2_E
    q_at = Q + b * q_b + h * q_h + row.to(tl.int64)[:, None] * q_row + d[None, :]
    q = tl.load(q_at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(OPERAND)

    acc, norm = tl.zeros([QUERIES, DIM], tl.float32), tl.zeros([QUERIES], tl.float32)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    whole = image_keys + (keys - image_keys) // KEYS * KEYS
    acc, norm, peak = _over(
        acc, norm, peak, q, K, V, Mask, k_row, v_row, image_keys, whole, scale,
        True, D, DIM, KEYS, OPERAND,
    )  # fmt: skip
    acc, norm, peak = _over(
        acc, norm, peak, q, K, V, Mask, k_row, v_row, whole, keys, scale,
        False, D, DIM, KEYS, OPERAND,
    )  # fmt: skip
    of_image = acc, norm, peak
    p_first, p_rest = tl.where(is_negative, 0, before), tl.where(is_negative, rest, image_keys)
    acc, norm, peak = _over(
        acc, norm, peak, q, K, V, Mask, k_row, v_row, rest, p_rest, scale,
        False, D, DIM, KEYS, OPERAND,
    )  # fmt: skip
    acc, norm, peak = _over(
        acc, norm, peak, q, K, V, Mask, k_row, v_row, 0, p_first, scale,
        False, D, DIM, KEYS, OPERAND,
    )  # fmt: skip
    Out += b * out_b + h * out_h
    if OutN is not None:
        if is_image:
            _store(Out, out_row, acc, norm, row, inside, D, DIM)
            Out, out_row = OutN + b * outn_b + h * outn_h - tl.cast(image, tl.int64) * outn_row, outn_row
            acc, norm, peak = of_image

    sees = is_negative
    if Beta is not None:
        sees = is_negative | is_image
    norm_n, n = tl.zeros([QUERIES], tl.float32), tl.arange(0, NEGATIVES)
    # seldom more than one round: no stages, which would each hold a tile of beta in shared memory
    for at in tl.range(0, tl.where(sees, negative, 0), NEGATIVES, num_stages=1):
        key = at + n
        there = key < negative
        loaded = there[:, None] & (d < D)[None, :]
        k = tl.load(KN + b * kn_b + h * kn_h + key[:, None] * kn_row + d[None, :], mask=loaded, other=0.0)
        v = tl.load(VN + b * vn_b + h * vn_h + key[:, None] * vn_row + d[None, :], mask=loaded, other=0.0)
        logits = tl.dot(q, tl.trans(k.to(OPERAND)), input_precision="ieee") * scale
        hidden = key >= negative
        if Padding is not None:
            hidden |= tl.load(Padding + b * padding_b + key, mask=there, other=0) != 0
        logits = tl.where(hidden[None, :], float("-inf"), logits)
        if MaskN is not None:
            logits += tl.load(MaskN + b * mask_b + key, mask=there, other=0.0).to(tl.float32)[None, :] * LOG2_E
        weight = tl.full([NEGATIVES], 1.0, tl.float32)
        if Beta is not None and OutN is None:
            beta_at = Beta + b * beta_b + (row - image).to(tl.int64)[:, None] * beta_i + key[None, :] * beta_n
            logits -= tl.load(beta_at, mask=(inside & is_image)[:, None] & there[None, :], other=0.0) * LOG2_E
            alpha = tl.load(Alpha + b * alpha_b + key * alpha_n, mask=there, other=0.0)
            weight = tl.where(is_image, -alpha, weight)
        acc, norm, peak, kept, added = _step(acc, norm, peak, logits, v, weight[None, :], OPERAND)
        norm_n = norm_n * kept + added
    _store(Out, out_row, acc, norm, row, inside, D, DIM)
    if Share is not None:
        if is_image:
            share_at = Share + (b * heads + h) * (rows - image) + row - image
            tl.store(share_at, norm_n / tl.where(norm == 0.0, 1.0, norm), mask=inside)
