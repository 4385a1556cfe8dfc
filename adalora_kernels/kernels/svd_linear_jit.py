"""The Triton kernels of svd_linear and svd_delta; `svd_linear` launches them and says what for.

All sizes M, N, K, R may be odd: blocks are padded and masked. R_PAD is R rounded up to a power of
two that `tl.dot` takes, at least 16. e = scaling · E ⊙ mask. Rows of matrices are addressed with
64 bits. A pointer that is None switches off what it is for.
"""

import triton
import triton.language as tl

from .launch import INTERPRETED

# Rounds of Philox-4x32; seven are the fewest that pass BigCrush (Salmon et al., SC 2011).
_ROUNDS = tl.constexpr(7)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _dot_exactly_as_stored(x, w, acc, PRECISION: tl.constexpr):
    """acc + x·w. The interpreter multiplies the raw bits of bfloat16 (triton #11584)."""
    if _INTERPRETED:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def _clear_low_bits(w):
    """float32 cut to the 11 significant bits that TF32 has."""
    return (w.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _dot(x, w, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x·w, for w (an adapter, h or u) of any floating type.

    Not WIDE: w is rounded to the type of x. WIDE: x is half precision and w counts in float32. It
    is split into three parts of the tensor cores' own type, whose sum is w, so that three products
    give what a float32 product would. bfloat16 has the range for that; float16 has not, and takes
    TF32, in which its values are exact.
    """
    if not WIDE:
        return _dot_exactly_as_stored(x, w.to(x.dtype), acc, PRECISION)
    w = w.to(tl.float32)
    if x.dtype == tl.bfloat16:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = _dot_exactly_as_stored(x, low, acc, "ieee")
        acc = _dot_exactly_as_stored(x, middle, acc, "ieee")
        return _dot_exactly_as_stored(x, high, acc, "ieee")
    x = x.to(tl.float32)
    high = _clear_low_bits(w)
    middle = _clear_low_bits(w - high)
    acc = _dot_exactly_as_stored(x, (w - high) - middle, acc, "tf32")
    acc = _dot_exactly_as_stored(x, middle, acc, "tf32")
    return _dot_exactly_as_stored(x, high, acc, "tf32")


@triton.jit
def _kept(
    seed_ptr, rows, first_column, K, drop_below, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Which entries of (rows, COLUMNS from first_column) of a (·, K) matrix dropout keeps.

    The twin of `reference.philox_mask`: entry i takes half i % 2 of lane i // 2 % 4 of counter
    i // 8. ALIGNED: K and first_column are multiples of 8, so a counter serves 8 neighbours.
    """
    seed = tl.load(seed_ptr)
    rows = rows.to(tl.int64)[:, None]
    if ALIGNED:
        counters = first_column // 8 + tl.arange(0, COLUMNS // 8)
        w0, w1, w2, w3 = tl.randint4x(seed, rows * (K // 8) + counters[None, :], _ROUNDS)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [·, COLUMNS / 8, 2, 2]
        halves = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
        halves = tl.reshape(halves, (rows.shape[0], COLUMNS))
    else:
        i = rows * K + (first_column + tl.arange(0, COLUMNS))[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, i // 8, _ROUNDS)
        lane = i // 2 % 4
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        halves = (tl.where(i % 2 == 0, word, word >> 16)) & 0xFFFF
    return halves.to(tl.int32) >= drop_below


@triton.jit
def _effective_e(e_ptr, mask_ptr, ranks, R, scaling):
    """e for these ranks, float32; 0 for padding."""
    e = tl.load(e_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32) * scaling
    if mask_ptr is not None:
        e = tl.where(tl.load(mask_ptr + ranks, mask=ranks < R, other=0) != 0, e, 0.0)
    return e


@triton.jit(do_not_specialize=["M", "drop_below"])
def down_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    seed_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    k_per_split,
    drop_below,
    keep_scale,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = dropout(x)·Aᵀ; program (i, s) does rows block i and part s of K, into h[s] (M, R)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    ranks = tl.arange(0, R_PAD)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + ranks.to(tl.int64)[:, None] * K
    start = split * k_per_split
    h = tl.zeros((BLOCK_M, R_PAD), tl.float32)
    for k in range(start, tl.minimum(start + k_per_split, K), BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns[None, :] < K
        x = tl.load(
            x_rows + columns.to(tl.int64)[None, :] * stride_xk,
            mask=(rows[:, None] < M) & inside,
            other=0.0,
        )
        if seed_ptr is not None:
            x = tl.where(_kept(seed_ptr, rows, k, K, drop_below, BLOCK_K, ALIGNED), x, 0.0)
        a = tl.load(a_rows + columns[None, :], mask=(ranks[:, None] < R) & inside, other=0.0)
        h = _dot(x, tl.trans(a), h, WIDE, PRECISION)
    out = h_ptr + (split.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(out, h * keep_scale, mask=(rows[:, None] < M) & (ranks[None, :] < R))


@triton.jit
def _low_rank_product(
    acc,
    low_ptr,
    h_ptr,
    e_ptr,
    mask_ptr,
    v_ptr,
    rows,
    columns,
    M,
    N,
    R,
    stride_vr,
    stride_vn,
    scaling,
    writes_h,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    R_PAD: tl.constexpr,
):
    """acc + (Σ_s low[s] ⊙ e)·v for low (SPLITS, M, R) and v (R, N); e is 1 without e_ptr.

    Where there is an h_ptr (M, R), a caller that `writes_h` also stores the sum, before e, in it.
    """
    STEP: tl.constexpr = min(R_PAD, 32)
    for first in tl.range(0, R_PAD, STEP, num_stages=1):
        ranks = first + tl.arange(0, STEP)
        inside = (rows[:, None] < M) & (ranks[None, :] < R)
        offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        low = tl.load(low_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        for split in tl.static_range(1, SPLITS):
            part = low_ptr + tl.cast(split, tl.int64) * M * R
            low += tl.load(part + offsets, mask=inside, other=0.0).to(tl.float32)
        if h_ptr is not None:
            tl.store(h_ptr + offsets, low, mask=inside & writes_h)
        if e_ptr is not None:
            low *= _effective_e(e_ptr, mask_ptr, ranks, R, scaling)[None, :]
        v = tl.load(
            v_ptr + ranks[:, None] * stride_vr + columns.to(tl.int64)[None, :] * stride_vn,
            mask=(ranks[:, None] < R) & (columns[None, :] < N),
            other=0.0,
        )
        acc = _dot_exactly_as_stored(low.to(DTYPE), v.to(DTYPE), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "drop_below"])
def low_rank_add_kernel(
    base_ptr,
    out_ptr,
    low_ptr,
    h_ptr,
    e_ptr,
    mask_ptr,
    v_ptr,
    seed_ptr,
    M,
    N,
    R,
    stride_bm,
    stride_bn,
    stride_vr,
    stride_vn,
    scaling,
    drop_below,
    keep_scale,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out (M, N) = base + dropout'((Σ_s low[s] ⊙ e)·v), or without base; one tile per program."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    acc = _low_rank_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        low_ptr,
        h_ptr,
        e_ptr,
        mask_ptr,
        v_ptr,
        rows,
        columns,
        M,
        N,
        R,
        stride_vr,
        stride_vn,
        scaling,
        tile_n == 0,
        DTYPE,
        PRECISION,
        SPLITS,
        R_PAD,
    )
    if seed_ptr is not None:
        kept = _kept(seed_ptr, rows, tile_n * BLOCK_N, N, drop_below, BLOCK_N, ALIGNED)
        acc = tl.where(kept, acc * keep_scale, 0.0)
    if base_ptr is not None:
        base = base_ptr + rows.to(tl.int64)[:, None] * stride_bm
        base += columns.to(tl.int64)[None, :] * stride_bn
        acc += tl.load(base, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out, acc, mask=inside)


@triton.jit(do_not_specialize=["M", "drop_below"])
def gemm_kernel(
    x,
    w,
    out,
    bias_ptr,
    low_ptr,
    h_ptr,
    a_ptr,
    e_ptr,
    mask_ptr,
    v_ptr,
    seed_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_vr,
    stride_vn,
    scaling,
    drop_below,
    keep_scale,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out (M, N) = x (M, K)·w (K, N) + bias + dropout'(low·v), tile by tile; persistent.

    low is that of `_low_rank_product`; with SPLITS = 0 it is made here, as (x·aᵀ) ⊙ e, while x
    goes by. x, w and out are descriptors if TMA, else pointers; W_BY_ROWS: the descriptor of w is
    that of its transpose (N, K). Dropout, which is the one of dx, needs low before the main loop;
    otherwise the low-rank step is the last.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        # Tiles that run at the same time share rows of x and columns of w in the L2.
        group = tile // (GROUP_M * tiles_n)
        in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + tile % (GROUP_M * tiles_n) % in_group
        tile_n = tile % (GROUP_M * tiles_n) // in_group
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, R_PAD)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if seed_ptr is not None:
            acc = _low_rank_product(
                acc,
                low_ptr,
                h_ptr,
                e_ptr,
                mask_ptr,
                v_ptr,
                rows,
                columns,
                M,
                N,
                R,
                stride_vr,
                stride_vn,
                scaling,
                tile_n == 0,
                DTYPE,
                PRECISION,
                SPLITS,
                R_PAD,
            )
            kept = _kept(seed_ptr, rows, tile_n * BLOCK_N, N, drop_below, BLOCK_N, ALIGNED)
            acc = tl.where(kept, acc * keep_scale, 0.0)
        if SPLITS == 0:
            h = tl.zeros((BLOCK_M, R_PAD), tl.float32)
        if not TMA:
            reduced = tl.arange(0, BLOCK_K)
            x_tiles = x + rows.to(tl.int64)[:, None] * stride_xm
            x_tiles += reduced.to(tl.int64)[None, :] * stride_xk
            w_tiles = w + columns.to(tl.int64)[None, :] * stride_wn
            w_tiles += reduced.to(tl.int64)[:, None] * stride_wk
        for k in range(0, K, BLOCK_K):
            if TMA:
                x_tile = x.load([tile_m * BLOCK_M, k])
                if W_BY_ROWS:
                    w_tile = w.load([tile_n * BLOCK_N, k]).T
                else:
                    w_tile = w.load([k, tile_n * BLOCK_N])
            else:
                inside = reduced < K - k
                x_tile = tl.load(x_tiles, mask=(rows[:, None] < M) & inside[None, :], other=0.0)
                w_tile = tl.load(w_tiles, mask=inside[:, None] & (columns[None, :] < N), other=0.0)
                x_tiles += BLOCK_K * tl.cast(stride_xk, tl.int64)
                w_tiles += BLOCK_K * tl.cast(stride_wk, tl.int64)
            acc = _dot_exactly_as_stored(x_tile, w_tile, acc, PRECISION)
            if SPLITS == 0:
                at = k + tl.arange(0, BLOCK_K)[None, :]
                a_inside = (ranks[:, None] < R) & (at < K)
                a = tl.load(a_ptr + ranks.to(tl.int64)[:, None] * K + at, mask=a_inside, other=0.0)
                h = _dot(x_tile, tl.trans(a), h, WIDE, PRECISION)
        if SPLITS == 0:
            inside = (rows[:, None] < M) & (ranks[None, :] < R)
            offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
            tl.store(h_ptr + offsets, h, mask=inside & (tile_n == 0))
            low = h * _effective_e(e_ptr, mask_ptr, ranks, R, scaling)[None, :]
            v = tl.load(
                v_ptr + ranks[:, None] * stride_vr + columns.to(tl.int64)[None, :] * stride_vn,
                mask=(ranks[:, None] < R) & (columns[None, :] < N),
                other=0.0,
            )
            acc = _dot_exactly_as_stored(low.to(DTYPE), v.to(DTYPE), acc, PRECISION)
        elif seed_ptr is None:
            acc = _low_rank_product(
                acc,
                low_ptr,
                h_ptr,
                e_ptr,
                mask_ptr,
                v_ptr,
                rows,
                columns,
                M,
                N,
                R,
                stride_vr,
                stride_vn,
                scaling,
                tile_n == 0,
                DTYPE,
                PRECISION,
                SPLITS,
                R_PAD,
            )
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if TMA:
            # In halves, so that the staging buffer leaves room for another pipeline stage.
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], left.to(DTYPE))
            out.store([tile_m * BLOCK_M, tile_n * BLOCK_N + BLOCK_N // 2], right.to(DTYPE))
        else:
            tl.store(
                out + rows.to(tl.int64)[:, None] * N + columns[None, :],
                acc,
                mask=(rows[:, None] < M) & (columns[None, :] < N),
            )


@triton.jit(do_not_specialize=["M", "m_per_split"])
def g_pass_kernel(
    g_ptr,
    b_ptr,
    h_ptr,
    e_ptr,
    mask_ptr,
    u_ptr,
    db_ptr,
    M,
    N,
    R,
    stride_gm,
    stride_gn,
    scaling,
    m_per_split,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (i, s): for columns block i and rows part s of g, u[i] (M, R) and dB[s] (N, R)."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    ranks = tl.arange(0, R_PAD)
    ranks_inside = ranks[None, :] < R
    b_inside = (columns[:, None] < N) & ranks_inside
    b_offsets = columns.to(tl.int64)[:, None] * R + ranks[None, :]
    b = tl.load(b_ptr + b_offsets, mask=b_inside, other=0.0)
    e = _effective_e(e_ptr, mask_ptr, ranks, R, scaling)
    g_columns = g_ptr + columns.to(tl.int64)[None, :] * stride_gn
    u_block = u_ptr + tl.program_id(0).to(tl.int64) * M * R
    db = tl.zeros((BLOCK_N, R_PAD), tl.float32)
    for m in range(split * m_per_split, tl.minimum((split + 1) * m_per_split, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        g = tl.load(
            g_columns + rows.to(tl.int64)[:, None] * stride_gm,
            mask=(rows[:, None] < M) & (columns[None, :] < N),
            other=0.0,
        )
        h_inside = (rows[:, None] < M) & ranks_inside
        h_offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        h = tl.load(h_ptr + h_offsets, mask=h_inside, other=0.0).to(tl.float32) * e[None, :]
        u = _dot(g, b, tl.zeros((BLOCK_M, R_PAD), tl.float32), WIDE, PRECISION)
        tl.store(u_block + h_offsets, u, mask=h_inside)
        db = _dot(tl.trans(g), h, db, WIDE, PRECISION)
    tl.store(db_ptr + split.to(tl.int64) * N * R + b_offsets, db, mask=b_inside)


@triton.jit(do_not_specialize=["M", "n_parts", "m_parts"])
def g_reduce_kernel(
    u_ptr,
    db_parts_ptr,
    h_ptr,
    e_ptr,
    mask_ptr,
    ue_ptr,
    de_parts_ptr,
    db_ptr,
    M,
    N,
    R,
    scaling,
    n_parts,
    m_parts,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The first programs: u ⊙ e (M, R), float32, and parts of Σ_rows u ⊙ h; the others: dB."""
    ranks = tl.arange(0, R_PAD)
    program = tl.program_id(0)
    row_blocks = tl.cdiv(M, BLOCK_M)
    of_rows = program < row_blocks
    parts_ptr = u_ptr if of_rows else db_parts_ptr
    length = M if of_rows else N
    parts = n_parts if of_rows else m_parts
    first = program if of_rows else program - row_blocks
    rows = first * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows[:, None] < length) & (ranks[None, :] < R)
    offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    total = tl.zeros((BLOCK_M, R_PAD), tl.float32)
    for part in range(parts):
        at = parts_ptr + tl.cast(part, tl.int64) * length * R + offsets
        total += tl.load(at, mask=inside, other=0.0)
    if of_rows:
        e = _effective_e(e_ptr, mask_ptr, ranks, R, scaling)
        tl.store(ue_ptr + offsets, total * e[None, :], mask=inside)
        h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        de = tl.sum(total * h, axis=0)
        tl.store(de_parts_ptr + program * R + ranks, de, mask=ranks < R)
    else:
        tl.store(db_ptr + offsets, total, mask=inside)


@triton.jit(do_not_specialize=["M", "m_per_split", "drop_below"])
def x_pass_kernel(
    x_ptr,
    ue_ptr,
    da_ptr,
    seed_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    m_per_split,
    drop_below,
    keep_scale,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, s): columns block i of dA[s] (R, K) = (u ⊙ e)ᵀ·dropout(x), over rows part s."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    ranks = tl.arange(0, R_PAD)
    x_columns = x_ptr + columns.to(tl.int64)[None, :] * stride_xk
    da = tl.zeros((BLOCK_K, R_PAD), tl.float32)
    for m in range(split * m_per_split, tl.minimum((split + 1) * m_per_split, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        x = tl.load(
            x_columns + rows.to(tl.int64)[:, None] * stride_xm,
            mask=(rows[:, None] < M) & (columns[None, :] < K),
            other=0.0,
        )
        if seed_ptr is not None:
            first = tl.program_id(0) * BLOCK_K
            x = tl.where(_kept(seed_ptr, rows, first, K, drop_below, BLOCK_K, ALIGNED), x, 0.0)
        ue = tl.load(
            ue_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :],
            mask=(rows[:, None] < M) & (ranks[None, :] < R),
            other=0.0,
        )
        da = _dot(tl.trans(x), ue, da, WIDE, PRECISION)
    # Written as (R, K), like dA.
    out = da_ptr + (split.to(tl.int64) * R + ranks)[None, :] * K + columns[:, None]
    tl.store(out, da * keep_scale, mask=(columns[:, None] < K) & (ranks[None, :] < R))


@triton.jit(do_not_specialize=["m_parts", "de_parts"])
def x_reduce_kernel(
    da_parts_ptr,
    de_parts_ptr,
    mask_ptr,
    da_ptr,
    de_ptr,
    numel,
    R,
    scaling,
    m_parts,
    de_parts,
    R_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The last program: dE = scaling · mask ⊙ Σ parts; the others: dA, R·K = `numel` entries."""
    program = tl.program_id(0)
    if program < tl.num_programs(0) - 1:
        offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(m_parts):
            at = da_parts_ptr + tl.cast(part, tl.int64) * numel + offsets
            total += tl.load(at, mask=offsets < numel, other=0.0)
        tl.store(da_ptr + offsets, total, mask=offsets < numel)
    else:
        ranks = tl.arange(0, R_PAD)
        de = tl.zeros((BLOCK_PARTS, R_PAD), tl.float32)
        for first in range(0, de_parts, BLOCK_PARTS):
            parts = first + tl.arange(0, BLOCK_PARTS)
            inside = (parts[:, None] < de_parts) & (ranks[None, :] < R)
            at = de_parts_ptr + parts[:, None] * R + ranks[None, :]
            de += tl.load(at, mask=inside, other=0.0)
        sums = tl.sum(de, axis=0) * scaling
        if mask_ptr is not None:
            kept = tl.load(mask_ptr + ranks, mask=ranks < R, other=0)
            sums = tl.where(kept != 0, sums, 0.0)
        tl.store(de_ptr + ranks, sums, mask=ranks < R)
