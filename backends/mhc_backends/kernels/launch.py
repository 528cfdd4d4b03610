"""The launch of every kernel: the one place for threads, tiles and vector widths.

The order of the sums for one token depends on the launch shape only through the number of threads,
which does not depend on the number of tokens. So a token's result does not depend on its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mhc_backends.kernels.table import MOST_THREADS, SIMD, TABLE, Shape, shape_of

__all__ = [
    "GATED_TILES",
    "MANY_GATED_TILES",
    "TILE_COLUMNS",
    "TILE_TOKENS",
    "Launch",
    "buffer_bytes",
    "channel_tiles",
    "column_tiles",
    "columns",
    "columns_at_once",
    "few",
    "few_mixed",
    "fewest",
    "gated_parts",
    "gated_steps",
    "gated_token_tiles",
    "gated_width",
    "k_blocks",
    "launch",
    "occupancy",
    "operand_bytes",
    "per_split",
    "run_steps",
    "shares",
    "slab_bytes",
    "slabs",
    "splits",
    "stage",
    "stream_steps",
    "tile_record",
    "whole_steps",
    "whole_streams",
]

MOST_GRID = 2**31 - 1  # threads along one axis, which MLX takes as an int
ACCESS_BYTES = 16  # the widest access to memory
FILLED = 256  # threadgroups that keep a GPU busy; with more, each may have several iterations
ROWS = 256  # the least rows that a threadgroup sums, unless there are fewer
SHARES = 256  # the most shares of the tokens, if a token is large
SHARE_NUMBERS = 8192  # numbers of a large token; smaller tokens have up to 4 times as many shares
KEPT_WORDS = {"metal": 64, "cuda": 128}  # words of 32 bits that a thread keeps between two uses
TILE_TOKENS, STEP_CHANNELS, SPLIT_CHANNELS = 16, 32, 256  # the same as in common/project/layout.h
SPLIT_STEPS = SPLIT_CHANNELS // STEP_CHANNELS  # K steps of one stream in a split
TILE_COLUMNS = 8  # the same as in the dialects
COLUMNS_AT_ONCE = 64  # columns of phi whose sums a simdgroup keeps in registers
# tiles of tokens that a simdgroup of `project` multiplies by the same phi
TOKEN_TILES = {"float32": 1, "float16": 2, "bfloat16": 2}
AHEAD = {"metal": 0, "cuda": 2}  # pipeline buffers: K blocks of the streams being copied
BUSY = 512  # simdgroups that keep a GPU busy with products
MOST_GROUPS = {"metal": MOST_GRID // 1024, "cuda": 128}  # threadgroups, each with a split of phi
MOST_TOKENS = 4  # tokens whose partials a threadgroup adds up
SHARED = 2048  # floats of threadgroup memory for the sums of some tokens
SHARE_TOKENS = 128  # the least tokens of an N tile's simdgroup, unless there are fewer
# tokens whose K blocks leave their threadgroup as separate sums: no Apple GPU was measured, and the
# sums of more tokens would be most of the bytes
FEWEST_TOKENS = {"metal": 4, "cuda": 64}
FEWEST_SPLITS = 64  # splits of all tiles of tokens; with more, their threadgroups fill a GPU
# times as many of both where streams are mixed before they are multiplied
FEWEST_TIMES_MIXED = {"metal": 1, "cuda": 2}
# tokens of combine_project_few, beside `few`: its threadgroups all read a split's phi; more of
# float32 were not measured
FEW_MIXED_TOKENS = {"metal": 16, "cuda": 2**31}
FEW_MIXED_FLOATS = 256
FEWEST_STREAMS = 4  # with more, the mappings do not fit into the lanes of a simdgroup
SPLITS_AT_ONCE = 32  # splits whose partials are in threadgroup memory
K_BLOCK = 4  # the most streams in a K block of combine_project
SPREAD = 128  # threadgroups, one for each of a large GPU's multiprocessors
# tokens beyond which a threadgroup of `pre_k_blocks` takes more channels in CUDA: each of a token's
# threadgroups adds up all of its sums
ONE_TOKENS = 32
# tiles of columns whose sums a simdgroup of the gates' kernels keeps: CUDA's product of floats
# (cuda/dialect/operands.h) has the same bits with any even number of them
GATED_TILES = 2
# of `gated_collapse` where there are many tokens, and always in its vjp, whose sums need one tree,
# and in `gated_dx`, which has a lane for each of these channels
MANY_GATED_TILES = 4
GATED_COLUMN_SHARES = 4  # shares of the columns of `gated_dfactors`
# tiles of tokens that a simdgroup of `gated_project` multiplies by the same columns, at most
GATED_TOKEN_TILES = {"float32": 1, "float16": 2, "bfloat16": 2}
GATED_COLUMNS = 31  # columns of a threadgroup of `gated_low`, LOW_COLUMNS in its body
# streams at a time in a threadgroup of `gated_collapse` and its vjp, as in
# common/project/gate_logits.h
GATED_STREAMS = 8
# a tile's copies in threadgroup memory, of which one is computed on: with more streams to copy,
# two are as many as two threadgroups of a multiprocessor have room for
STAGES, FEW_STAGES = 3, 2
SLAB_SIMDGROUPS = 8  # of a threadgroup of `project_vjp`, each with 32 channels of a stream
SLAB_STREAMS = range(2, 5)  # the streams that they can have
SLAB_GROUPS = 264  # threadgroups for which an H200 has room, two for each multiprocessor
SLAB_SHARES = 8  # the most shares of the tokens, each of which writes a dphi
SCRATCH = {
    "metal": 8192,
    "cuda": 10240,
}  # floats of threadgroup memory for the sums of some K blocks

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Launch:
    """The parameters of a launch: the grid in threads, and template arguments of the kernel.

    The template arguments are the elements per thread and access (W), the tokens that a threadgroup
    takes together (TOKENS), the accesses that a thread keeps in registers (HELD), and whether there
    are more (REST).
    """

    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    elements: int
    tokens: int = 1
    held: int = 1
    rest: bool = False


def launch(kernel: str, T: int, n: int, C: int, dtype: str, dialect: str = "metal") -> Launch:
    """Choose the launch shape for T tokens (or rows) of n streams of C channels.

    The grid is a multiple of the threadgroup, which is a multiple of 32, in both dialects: no
    kernel meets a simdgroup with missing threads.
    """
    shape = shape_of(kernel, dialect)
    if shape.groups == "rows":
        return _rows(shape, T, C)
    if shape.groups == "matrices":
        return _matrices(shape, T, n)
    if shape.groups == "split_k":
        return _split_k(shape, T, C, TOKEN_TILES[dtype] if kernel == "project" else 1, dialect)
    if shape.groups == "k_blocks":
        each = per_split(kernel, n, dtype)
        return _split_k_few(shape, T, n, C, each, dialect)
    if shape.groups == "k_block":
        count, tiles = k_blocks(kernel, n, C, dtype), column_tiles(kernel, T, n, C, dtype, dialect)
        return _spread(shape, T, columns(kernel, n), count, tiles)
    if shape.groups == "sums":
        return _several(T, n, 1, shape.threads, 1)
    if shape.groups == "n_tiles":
        return _n_tiles(shape, T, n, C)
    if shape.groups == "gated_factors":
        return _gated_factors(shape, T, n, C)
    if shape.groups == "slabs":
        return _slabs(T, n, C)
    if shape.groups == "mixes":
        return _launch(-(-T * (n * n + n) // shape.threads), 1, shape.threads, 1)
    if shape.groups == "tiles":
        return _launch(-(-T // TILE_TOKENS), 1, shape.threads, 1)
    if shape.groups.startswith("gated"):
        return _gated(shape, T, n, C, dtype)
    elements = _elements(shape, n, C, dtype)
    accesses = -(-C // elements)
    threads = _threads(shape, accesses * n if shape.streams else accesses)
    if shape.groups == "several" and not shape.keeps:
        return _several(T, n, accesses, threads, elements)
    if shape.groups == "one":
        return _one(shape, T, accesses, elements, dialect)
    groups = _token_shares(shape, T, n * C) if shape.groups == "share" else T
    if shape.keeps:
        turns = -(-accesses // threads)
        words = n * max(elements * ITEMSIZE[dtype] // 4, 1)  # narrow numbers are kept unconverted
        if shape.layers:
            words = elements
        held = min(turns, KEPT_WORDS[dialect] // (shape.keeps * words))
        made = _launch(groups, 1, threads, elements)
        if shape.groups == "several":
            made = _several(T, n, 1, threads, elements)
        return replace(made, held=held, rest=held < turns)
    tiles = -(-accesses // threads) if shape.groups == "tile" else 1
    if T * tiles > FILLED:
        tiles = -(-tiles // shape.iterations)
    return _launch(groups, tiles, threads, elements)


def occupancy(kernel: str, dtype: str, n: int, threads: int, tiles: int = 1) -> tuple[int, int]:
    """Return the most threads of a kernel's threadgroup, and how many threadgroups must fit.

    ``threads`` are those of a launch, and ``tiles`` the tiles of columns of phi that a simdgroup
    has.
    """
    shape = shape_of(kernel, "cuda")
    resident = shape.resident if n in shape.resident_streams else 1
    if tiles > 1:
        resident = shape.resident_tiles or resident
    if dtype == "float32":
        resident = shape.resident_float32 or resident
    return max(shape.threads, threads), resident


def _token_shares(shape: Shape, T: int, numbers: int) -> int:
    """Split the tokens evenly; the order of a sum depends only on the sizes."""
    times = 4 if shape.streams else min(max(SHARE_NUMBERS // numbers, 1), 4)
    most = SHARES * times
    return -(-T // max(-(-T // most), 1))


def _elements(shape: Shape, n: int, C: int, dtype: str) -> int:
    """Return the largest power of two within all limits that divides C, hence every row."""
    held = shape.numbers // (n * max(shape.keeps, 1))
    most = min(shape.elements, ACCESS_BYTES // ITEMSIZE[dtype], max(held, 1))
    return math.gcd(C, 1 << (most.bit_length() - 1))


def _threads(shape: Shape, needed: int) -> int:
    return min(shape.threads, -(-needed // SIMD) * SIMD)


def _matrices(shape: Shape, T: int, n: int) -> Launch:
    lanes = 1 << (n - 1).bit_length()
    threads = _threads(shape, T * lanes)
    return _launch(-(-T * lanes // threads), 1, threads, 1)


def _rows(shape: Shape, rows: int, columns: int) -> Launch:
    """Choose the number of shares in which the rows are summed; it depends only on the rows."""
    width = min(columns, shape.threads)
    return _launch(-(-rows // ROWS), -(-columns // width), shape.threads, 1)


def splits(C: int) -> int:
    """Return the number of split-K partials of a sum over the channels of all streams."""
    return -(-C // SPLIT_CHANNELS)


def few(T: int, C: int) -> bool:
    """Return whether tokens are so few that simdgroups share K blocks; this changes no bit."""
    return -(-T // (max(TOKEN_TILES.values()) * TILE_TOKENS)) * splits(C) < BUSY


def few_mixed(T: int, C: int, dtype: str, dialect: str) -> bool:
    """Return the same for streams that are mixed before they are multiplied."""
    most = FEW_MIXED_TOKENS[dialect]
    most = min(most, FEW_MIXED_FLOATS) if dtype == "float32" else most
    return most >= T and -(-T // TILE_TOKENS) * splits(C) < BUSY


def fewest(T: int, n: int, C: int, dialect: str, mixed: bool = False) -> bool:
    """Return whether tokens are so few that K blocks spread over the GPU; this changes no bit.

    ``mixed`` says whether streams are mixed before they are multiplied.
    """
    times = FEWEST_TIMES_MIXED[dialect] if mixed else 1
    items = -(-T // TILE_TOKENS) * splits(C)
    fits = times * FEWEST_TOKENS[dialect] >= T and items <= times * FEWEST_SPLITS
    return fits and n <= FEWEST_STREAMS


def columns_at_once(tiles: int, dtype: str, dialect: str) -> int:
    """Return the tiles of columns whose operands a simdgroup of ``combine_project_few`` holds.

    With one, a multiprocessor has room for two threadgroups. But CUDA's product of floats
    (cuda/dialect/operands.h) has the same bits only with the same tiles.
    """
    return tiles if dialect == "cuda" and dtype == "float32" else 1


def run_steps(dtype: str) -> int:
    """Return the number of K steps of one stream in a K block of ``project``."""
    return 1 if dtype == "float32" else 2


def stream_steps(n: int, dtype: str) -> int:
    """Return the number of streams in a K block of ``combine_project``."""
    return 1 if dtype == "float32" else math.gcd(n, K_BLOCK)


def per_split(kernel: str, n: int, dtype: str) -> int:
    """Return the number of K blocks in a split."""
    return n * SPLIT_STEPS // _steps(kernel, n, dtype)


def k_blocks(kernel: str, n: int, C: int, dtype: str) -> int:
    """Return the number of K blocks in all splits."""
    if kernel.startswith("combine"):
        return -(-C // STEP_CHANNELS) * n // stream_steps(n, dtype)
    return -(-C // (run_steps(dtype) * STEP_CHANNELS)) * n


def _steps(kernel: str, n: int, dtype: str) -> int:
    return stream_steps(n, dtype) if kernel.startswith("combine") else run_steps(dtype)


def shares(kernel: str, T: int, n: int, C: int, dialect: str = "metal") -> int:
    """Return the number of token shares that a kernel sums separately."""
    made = launch(kernel, T, n, C, "float32", dialect)
    groups = made.grid[0] // made.threadgroup[0]
    shape = shape_of(kernel, dialect)
    if shape.groups == "gated_factors":
        return groups // (n * _factor_groups(shape, C))
    if shape.groups == "slabs":
        return groups // slabs(n, C)
    return groups // _n_tile_groups(shape, n, C) if shape.groups == "n_tiles" else groups


def _split_k(shape: Shape, T: int, C: int, token_tiles: int, dialect: str) -> Launch:
    tiles = -(-T // (token_tiles * TILE_TOKENS))
    simdgroups, most = shape.threads // SIMD, MOST_GROUPS[dialect]
    while simdgroups > 1 and -(-tiles // simdgroups) * splits(C) < min(most, FILLED):
        simdgroups //= 2
    # a persistent threadgroup: it keeps one split, and the split's phi, for all of its tokens
    most = min(most, MOST_GRID // (simdgroups * SIMD)) // splits(C)
    groups = max(min(-(-tiles // simdgroups), most), 1) * splits(C)
    return Launch((groups * simdgroups * SIMD, 1, 1), (simdgroups * SIMD, 1, 1), 1)


def _split_k_few(shape: Shape, T: int, n: int, C: int, each: int, dialect: str) -> Launch:
    width = TILE_COLUMNS * -(-min(n * n + 2 * n, COLUMNS_AT_ONCE) // TILE_COLUMNS) + 4
    # K blocks whose sums fit into threadgroup memory beside their total
    room = SCRATCH[dialect] // (TILE_TOKENS * width) - 1
    threads = min(shape.threads, room * SIMD, each * SIMD)
    return _launch(-(-T // TILE_TOKENS) * splits(C), 1, threads, 1)


def columns(kernel: str, n: int) -> int:
    """Return the columns of phi that a kernel for the fewest tokens multiplies by."""
    return n * n + 2 * n if TABLE[kernel].mixes else 2 * n


def column_tiles(kernel: str, T: int, n: int, C: int, dtype: str, dialect: str) -> int:
    """Return the tiles of columns that a simdgroup multiplies K blocks of the fewest tokens by.

    The more simdgroups, the sooner, on an H200. But each reads the streams, and mixes them; and
    CUDA's product of floats (cuda/dialect/operands.h) has the same bits only with the same tiles.
    """
    mixed = kernel.startswith("combine")
    sooner = fewest(T, n, C, dialect) if mixed else T <= TILE_TOKENS
    if dialect == "cuda" and dtype != "float32" and sooner:
        return 1
    return -(-columns(kernel, n) // TILE_COLUMNS)


def _spread(shape: Shape, T: int, columns: int, count: int, tiles: int) -> Launch:
    groups = -(-columns // (TILE_COLUMNS * tiles))
    items, simdgroups = -(-T // TILE_TOKENS) * count * groups, shape.threads // SIMD
    while simdgroups > 1 and items < simdgroups * SPREAD:
        simdgroups //= 2
    return _launch(-(-items // simdgroups), 1, simdgroups * SIMD, 1)


def _one(shape: Shape, T: int, accesses: int, elements: int, dialect: str) -> Launch:
    """Choose the threads of a token; one simdgroup has no channels."""
    most = shape.threads
    if dialect == "cuda" and T > ONE_TOKENS:
        most = min(2 * most - SIMD, MOST_THREADS[dialect])
    threads = min(most, -(-accesses // SIMD) * SIMD + SIMD)
    workers = max(threads - SIMD, SIMD)
    return _launch(T, -(-accesses // workers), threads, elements)


def operand_bytes(tiles: int, dtype: str, dialect: str) -> int:
    """Return the bytes of a K step's B operand in threadgroup memory, in a dialect's layout."""
    fragments = 2 * tiles
    if dialect == "cuda":
        fragments = 2 * (-(-3 * tiles // 2)) if dtype == "bfloat16" else 4 * tiles
    return fragments * SIMD * ACCESS_BYTES


def buffer_bytes(rows: int, dtype: str, kernel: str, dialect: str) -> int:
    """Return the bytes of ``rows`` rows of 8 numbers for each thread of a kernel's threadgroup."""
    return rows * 8 * ITEMSIZE[dtype] * shape_of(kernel, dialect).threads


def stage(steps: int, unit: int, most: int) -> int:
    """Return how many K steps' B operands are in threadgroup memory at a time.

    The count divides ``steps``, is a multiple of ``unit`` and, if possible, at most ``most``.
    """
    fit = (k for k in range(unit, steps + 1, unit) if steps % k == 0 and k <= most)
    return max(fit, default=unit)


def _n_tiles(shape: Shape, T: int, n: int, C: int) -> Launch:
    """Choose the shares of the tokens; they depend only on the sizes."""
    groups = _n_tile_groups(shape, n, C)
    shares = max(min(-(-T // SHARE_TOKENS), shape.iterations * FILLED // groups), 1)
    return _launch(groups * shares, 1, shape.threads, 1)


def _n_tile_groups(shape: Shape, n: int, C: int) -> int:
    """Count the threadgroups of a share; N tiles come in pairs, so that whole lines are read."""
    tiles = 2 * n * -(-C // (2 * STEP_CHANNELS))
    return -(-tiles // (shape.threads // SIMD))


# ---- dx and dphi in one pass --------------------------------------------------------------------


def slabs(n: int, C: int) -> int:
    """Return the slabs of channels of ``project_vjp``, or 0 if the channels are not whole slabs."""
    if n not in SLAB_STREAMS or C % (channels := _slab_channels(n)):
        return 0
    return C // channels


def _slab_channels(n: int) -> int:
    return SLAB_SIMDGROUPS // n * STEP_CHANNELS


def tile_record(n: int, columns: int, combines: bool) -> int:
    """Return the floats of the record of a tile, TileRecord in cuda/vjp/layout.h."""
    tiles = -(-columns // TILE_COLUMNS)
    operands = (tiles + -(-6 * tiles // 4)) * SIMD * 4
    return operands + 2 * n * TILE_TOKENS + combines * TILE_TOKENS * (n * n + n)


def slab_bytes(
    n: int, columns: int, dh_bytes: int, with_g: bool, combines: bool
) -> tuple[int, int]:
    """Return the stages of ``project_vjp`` and the bytes of threadgroup memory of them all.

    ``dh_bytes`` is the size of a number of dh, 0 without one: TileStage in cuda/vjp/layout.h.
    """
    channels = _slab_channels(n)

    def plane(size: int) -> int:  # a layer's rows, each with 16 bytes that are not used
        return TILE_TOKENS * (channels * size + ACCESS_BYTES)

    streams, layers = (1 + with_g + combines) * n, int(combines)
    record = ITEMSIZE["float32"] * tile_record(n, columns, combines)
    each = (streams + layers) * plane(2) + (plane(dh_bytes) if dh_bytes else 0) + record
    stages = FEW_STAGES if combines else STAGES
    return stages, stages * each + (n * plane(ITEMSIZE["float32"]) if combines else 0)


def _slabs(T: int, n: int, C: int) -> Launch:
    """Choose the shares of the tokens so that the threadgroups come in full rounds."""
    count, threads = slabs(n, C), SLAB_SIMDGROUPS // n * n * SIMD
    most = max(min(-(-T // SHARE_TOKENS), SLAB_SHARES), 1)
    shares = min(range(1, most + 1), key=lambda s: (-(-s * count // SLAB_GROUPS) / s, s))
    return _launch(count * shares, 1, threads, 1)


# ---- gates with a low-rank projection ------------------------------------------------------------


def whole_streams(T: int, n: int) -> bool:
    """Return whether threadgroups of ``gated_project`` take whole streams; this changes no bit."""
    return -(-T // TILE_TOKENS) * n >= SPREAD


def gated_steps(n: int, C: int) -> int:
    """Return the K steps of a split of one stream, so that those of a token fill a GPU."""
    most = max(n * C // (STEP_CHANNELS * SPREAD), 1)
    return min(1 << (most.bit_length() - 1), SPLIT_STEPS)


def gated_parts(T: int, n: int, C: int) -> int:
    """Return the partials of one stream that ``gated_project`` makes."""
    return 1 if whole_streams(T, n) else -(-C // (gated_steps(n, C) * STEP_CHANNELS))


def gated_width(rank: int, injected: int) -> int:
    """Return the columns of a partial: the products, then the squares."""
    columns = GATED_TILES * TILE_COLUMNS
    return (-(-rank // columns) * columns + injected if injected else rank) + 1


def gated_token_tiles(T: int, n: int, dtype: str) -> int:
    """Return the tiles of 16 tokens of a threadgroup of ``gated_project``; this changes no bit."""
    tiles = 1
    while 2 * tiles <= GATED_TOKEN_TILES[dtype] and whole_streams(T // (2 * tiles), n):
        tiles *= 2
    return tiles


def whole_steps(columns: int) -> int:
    """Return the columns with those that fill the last K step."""
    return -(-columns // STEP_CHANNELS) * STEP_CHANNELS


def channel_tiles(T: int, C: int) -> int:
    """Return the tiles of channels of a threadgroup of ``gated_collapse``; this changes no bit."""
    many = -(-T // TILE_TOKENS) * -(-C // (MANY_GATED_TILES * TILE_COLUMNS)) >= BUSY
    return MANY_GATED_TILES if many else GATED_TILES


def _gated(shape: Shape, T: int, n: int, C: int, dtype: str) -> Launch:
    if shape.groups == "gated_columns":  # C counts these
        return _launch(T, -(-C // GATED_COLUMNS), min(shape.threads, n * SIMD), 1)
    if shape.groups in ("gated_channels", "gated_pullback"):
        threads = min(shape.threads, min(n, GATED_STREAMS) * SIMD)
        pulls = shape.groups == "gated_pullback"
        each = MANY_GATED_TILES if pulls else channel_tiles(T, C)
        return _launch(-(-T // TILE_TOKENS) * -(-C // (each * TILE_COLUMNS)), 1, threads, 1)
    tiles = -(-T // (gated_token_tiles(T, n, dtype) * TILE_TOKENS))
    return _launch(tiles * n * gated_parts(T, n, C), 1, shape.threads, 1)


def _gated_factors(shape: Shape, T: int, n: int, C: int) -> Launch:
    """Choose the shares of the tokens; they depend only on the sizes."""
    groups = n * _factor_groups(shape, C)
    most = shape.iterations * FILLED // (groups * GATED_COLUMN_SHARES)
    shares = max(min(-(-T // SHARE_TOKENS), most), 1)
    return _launch(groups * shares, GATED_COLUMN_SHARES, _factor_threads(shape, C), 1)


def _factor_threads(shape: Shape, C: int) -> int:
    return _threads(shape, -(-C // STEP_CHANNELS) * SIMD)


def _factor_groups(shape: Shape, C: int) -> int:
    """Count the threadgroups of ``gated_dfactors`` that share a stream's channels."""
    return -(-C // _factor_threads(shape, C))  # a thread for each channel


def _several(T: int, n: int, accesses: int, threads: int, elements: int) -> Launch:
    """Choose the tokens of a threadgroup; with few tokens, threadgroups share their channels."""
    tokens = 1
    while tokens < MOST_TOKENS and 2 * tokens * FILLED <= T and 2 * tokens * (n + 1) ** 2 <= SHARED:
        tokens *= 2
    tiles = -(-accesses // threads) if T < FILLED else 1
    return replace(_launch(-(-T // tokens), tiles, threads, elements), tokens=tokens)


def _launch(groups: int, tiles: int, threads: int, elements: int) -> Launch:
    groups = min(groups, MOST_GRID // threads)  # each then takes several tokens, one by one
    return Launch((groups * threads, tiles, 1), (threads, 1, 1), elements)
