"""The common parts of the ops with a projection: its launches, and those of its vjp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mhc_backends.kernels import launch
from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, Stage, dtype_name, tokens
from mhc_backends.kernels.ops import combine
from mhc_core.variants import Variant

__all__ = [
    "DPHI_COLUMNS",
    "DPHI_STEPS",
    "Cotangents",
    "Norm",
    "Projected",
    "Streams",
    "Sums",
    "column_tiles",
    "combine_project",
    "combined_pullback",
    "constants",
    "local_vjp",
    "mapped",
    "pre",
    "pre_norm",
    "project",
    "project_for_pre",
    "projection_pullback",
    "pullback",
    "settings",
    "staging",
    "summed",
    "weights_norm_vjp",
    "weights_vjp",
]

DPHI_STEPS = 8  # K steps of 32 tokens whose du is in threadgroup memory at a time
DPHI_COLUMNS = 32  # columns whose sums a simdgroup keeps in registers
KEPT = 4  # the most streams that combine_project keeps in registers
# tokens of write_project_few, whose threadgroups all read a split's phi
MOST_FEW = {"metal": 16, "cuda": 256}
MOST_COLUMNS = 32  # columns whose B operands leave threadgroup memory for a second K step


class Projected(NamedTuple):
    """u = vec(x) @ phi.T and r = 1 / rms(x), float32, as ``mhc_core.math.mappings`` saves them."""

    u: Array
    r: Array


def settings(variant: Variant) -> dict[str, float]:
    """Return the variant's numbers, which are written into the text of its kernels."""
    v = variant
    low, high = v.sinkhorn_clamp or (0.0, 0.0)
    return {
        "norm_eps": v.norm_eps,
        "pre_eps": v.pre_eps,
        "post_scale": v.post_scale,
        "post_eps": v.post_eps,
        "sinkhorn_eps": v.sinkhorn_eps,
        "clamp_low": low,
        "clamp_high": high,
    }


def constants(variant: Variant) -> dict[str, int]:
    """Return the variant's choices that are compiled in."""
    return {
        "ITERATIONS": variant.sinkhorn_iterations,
        "LOG": variant.sinkhorn_eps == 0,
        "FIRST_COLUMNS": variant.sinkhorn_first == "columns",
        "TRANSPOSED": variant.res_transposed,
        "EXP_START": variant.sinkhorn_start == "exp" and variant.sinkhorn_eps > 0,
        "CLAMPED": variant.sinkhorn_clamp is not None,
    }


def project(kernels: Kernels, x: Array, phi: Array) -> Array:
    """Return the sums over all channels, as split-K partials."""
    return _over_devices(kernels, _project(kernels, x, phi))


def _over_devices(kernels: Kernels, partials: Array) -> Array:
    """Return split-K partials of the sums over the channels of all devices.

    All but the first split are 0. The last column is that of the squares, whose mean the next
    kernel takes over one device's channels.
    """
    if kernels.devices == 1:
        return partials
    count, splits, columns = partials.shape
    (total,) = kernels.over_channels(partials.sum(1))
    first = [*[1.0] * (columns - 1), 1 / kernels.devices]
    rows = kernels.host.constant([first, *[[0.0] * columns] * (splits - 1)])
    return total.reshape(count, 1, columns) * rows


def _project(kernels: Kernels, x: Array, phi: Array) -> Array:
    sizes = Sizes.of(x)
    inputs, out = {"x": tokens(x, 2), "phi": phi}, _partials(sizes, phi)
    run = 1 if phi.shape[0] > MOST_COLUMNS else launch.run_steps(dtype_name(x.dtype))
    tiles = column_tiles(phi.shape[0], launch.COLUMNS_AT_ONCE)
    chosen = {"RUN": run, "COLUMN_TILES": tiles}
    if launch.few(sizes.T, sizes.C):
        chosen["SCRATCH"] = launch.SCRATCH[kernels.dialect]
        return kernels("project_few", inputs, {"partials": out}, sizes, **chosen)[0]
    token_tiles = launch.TOKEN_TILES[dtype_name(x.dtype)]
    rows, most = 2 * token_tiles * run, launch.AHEAD[kernels.dialect]
    steps = sizes.n * launch.SPLIT_STEPS
    stage, ahead = staging(kernels, "project", x, tiles, steps, run, rows, most)
    chosen |= {"TOKEN_TILES": token_tiles, "AHEAD": ahead}
    return kernels("project", inputs, {"partials": out}, sizes, None, stage, **chosen)[0]


class Sums(NamedTuple):
    """Sums over all channels for ``pre``.

    They are split-K partials or, with ``blocks`` K blocks in a split, the sums of K blocks.
    """

    array: Array
    blocks: int = 0


def project_for_pre(kernels: Kernels, x: Array, phi: Array, mixes: bool) -> Sums:
    """Return the sums over all channels; those of the fewest tokens are sums of K blocks.

    ``mixes`` says whether an H_res is made of them.
    """
    sizes, dtype = Sizes.of(x), dtype_name(x.dtype)
    kernel = "project_k_blocks" if mixes else "project_unmixed_k_blocks"
    if kernels.devices > 1 or not launch.fewest(*sizes, kernels.dialect):
        return Sums(project(kernels, x, phi))
    chosen = {"RUN": launch.run_steps(dtype)}
    if mixes:
        tiles = launch.column_tiles(kernel, *sizes, dtype, kernels.dialect)
        chosen["COLUMN_TILES"] = tiles
    inputs, outputs = {"x": tokens(x, 2), "phi": phi}, {"blocks": _k_blocks(kernel, x)}
    made = kernels(kernel, inputs, outputs, sizes, **chosen)[0]
    return Sums(made, launch.per_split(kernel, sizes.n, dtype))


def combine_project(
    kernels: Kernels,
    x: Array,
    y: Array,
    h_post: Array,
    h_res: Array | None,
    phi: Array,
    mixes: bool = True,
    norms: bool = False,
) -> tuple[Array, Sums]:
    """Return x', and its sums over all channels.

    An H_res is made of them if it ``mixes``. ``norms`` says whether h is normalised.
    """
    sizes, dtype = Sizes.of(x), dtype_name(x.dtype)
    inputs = {**combine.inputs(x, y, h_post, h_res), "phi": phi}
    if h_res is None:
        return _write_project(kernels, x, inputs, mixes)
    steps = launch.stream_steps(sizes.n, dtype)
    # with a norm, one threadgroup adds up all K blocks of a token; and floats were not measured
    more = not norms and dtype != FLOAT32
    if mixes and kernels.devices == 1 and launch.fewest(*sizes, kernels.dialect, mixed=more):
        kernel = "combine_project_k_blocks"
        tiles = launch.column_tiles(kernel, *sizes, dtype, kernels.dialect)
        chosen = {"COLUMN_TILES": tiles, "STEPS": steps}
        outputs = {"out": Out.like(x), "blocks": _k_blocks(kernel, x)}
        x_new, blocks = kernels(kernel, inputs, outputs, sizes, **chosen)
        return x_new, Sums(blocks, launch.per_split(kernel, sizes.n, dtype))
    if sizes.n > KEPT and kernels.dialect == "cuda":  # else streams would be read for each other
        x_new = combine.forward(kernels, x, y, h_post, h_res)
        return x_new, Sums(project(kernels, x_new, phi))
    outputs = {"out": Out.like(x), "partials": _partials(sizes, phi)}
    tiles = column_tiles(phi.shape[0], launch.COLUMNS_AT_ONCE)
    narrow = dtype != FLOAT32
    chosen = {"COLUMN_TILES": tiles, "STEPS": steps}
    if launch.few_mixed(sizes.T, sizes.C, dtype, kernels.dialect):
        chosen["SCRATCH"] = launch.SCRATCH[kernels.dialect]
        chosen["AT_ONCE"] = launch.columns_at_once(tiles, dtype, kernels.dialect)
        x_new, partials = kernels("combine_project_few", inputs, outputs, sizes, **chosen)
    else:
        kept = sizes.n <= KEPT
        most = min(launch.AHEAD[kernels.dialect], 1) if narrow and kept else 0
        unit, rows = sizes.n if kept else chosen["STEPS"], 2 * (sizes.n + 1)
        steps = sizes.n * launch.SPLIT_STEPS
        stage, chosen["AHEAD"] = staging(
            kernels, "combine_project", x, tiles, steps, unit, rows, most
        )
        x_new, partials = kernels("combine_project", inputs, outputs, sizes, None, stage, **chosen)
    return x_new, Sums(_over_devices(kernels, partials))


def _write_project(
    kernels: Kernels, x: Array, inputs: Mapping[str, Array], mixes: bool
) -> tuple[Array, Sums]:
    """Return x' without H_res, and its sums over all channels in the order of ``project``."""
    sizes, dtype, phi = Sizes.of(x), dtype_name(x.dtype), inputs["phi"]
    run = 1 if phi.shape[0] > MOST_COLUMNS else launch.run_steps(dtype)
    tiles = column_tiles(phi.shape[0], launch.COLUMNS_AT_ONCE)
    chosen = {"RUN": run, "COLUMN_TILES": tiles}
    out = {"out": Out.like(x)}
    if not mixes and kernels.devices == 1 and launch.fewest(*sizes, kernels.dialect):
        kernel = "write_project_k_blocks"
        outputs = {**out, "blocks": _k_blocks(kernel, x)}
        x_new, blocks = kernels(kernel, inputs, outputs, sizes, **chosen)
        return x_new, Sums(blocks, launch.per_split(kernel, sizes.n, dtype))
    outputs = {**out, "partials": _partials(sizes, phi)}
    if MOST_FEW[kernels.dialect] >= sizes.T and launch.few(sizes.T, sizes.C):
        chosen["SCRATCH"] = launch.SCRATCH[kernels.dialect]
        x_new, partials = kernels("write_project_few", inputs, outputs, sizes, **chosen)
    else:
        steps, most = sizes.n * launch.SPLIT_STEPS, launch.AHEAD[kernels.dialect]
        stage, chosen["AHEAD"] = staging(
            kernels, "write_project", x, tiles, steps, run, 2 * run, most
        )
        x_new, partials = kernels("write_project", inputs, outputs, sizes, None, stage, **chosen)
    return x_new, Sums(_over_devices(kernels, partials))


def _k_blocks(kernel: str, x: Array) -> Out:
    """Return the output for the sums of K blocks, whose layout is in common/project."""
    sizes = Sizes.of(x)
    columns = launch.columns(kernel, sizes.n)
    count = launch.k_blocks(kernel, sizes.n, sizes.C, dtype_name(x.dtype))
    return Out((sizes.T, count, -(-columns // 4) * 4 + 4), FLOAT32)


def _partials(sizes: Sizes, phi: Array) -> Out:
    return Out((sizes.T, launch.splits(sizes.C), phi.shape[0] + 1), FLOAT32)


def column_tiles(columns: int, most: int) -> int:
    """Return the tiles of columns that a simdgroup multiplies by at a time."""
    return -(-min(columns, most) // launch.TILE_COLUMNS)


def staging(
    kernels: Kernels,
    kernel: str,
    x: Array,
    tiles: int,
    steps: int,
    unit: int,
    rows: int = 0,
    most: int = 0,
) -> tuple[Stage, int]:
    """Choose the number of K steps whose B operands are in threadgroup memory, at least ``unit``.

    Also return the number of pipeline buffers of ``rows`` rows per thread, at most ``most``.
    """
    dtype = dtype_name(x.dtype)
    each = launch.operand_bytes(tiles, dtype, kernels.dialect)
    buffer = launch.buffer_bytes(rows, dtype, kernel, kernels.dialect)
    fit = (k for k in range(most, 0, -1) if k * buffer + unit * each <= kernels.memory)
    ahead = next(fit, 0)
    room = (kernels.memory - ahead * buffer) // each
    return Stage(launch.stage(steps, unit, room), each, ahead * buffer), ahead


# ---- the last stage ------------------------------------------------------------------------------


def mapped(
    ahead: Sequence[int], n: int, columns: int, mixes: bool, saves: bool
) -> dict[str, Out | None]:
    """Return the outputs for the mappings of all tokens and, with ``saves``, for their vjp."""
    mixing = {"h_res": (n, n)} if mixes else {}
    wanted = {"h_pre": (n,), "h_post": (n,), **mixing, "u": (columns,), "r": (1,)}
    return {
        name: Out((*ahead, *last), FLOAT32, True) if saves or name not in ("u", "r") else None
        for name, last in wanted.items()
    }


class Norm(NamedTuple):
    """The RMS norm of h, and whether h itself is wanted too."""

    weight: Array
    eps: float
    raw: bool


class Pre(NamedTuple):
    """The results of the kernel ``pre``; ``saved`` holds u and r if they were requested.

    With a norm, h is normalised, and ``raw`` is h itself if it was requested.
    """

    h: Array
    h_pre: Array
    h_post: Array
    h_res: Array | None
    saved: tuple[Array, ...]
    raw: Array | None = None


def pre(
    kernels: Kernels,
    x: Array,
    sums: Sums,
    scale: Array,
    bias: Array,
    given: Array | None,
    variant: Variant,
    saves: bool = True,
) -> Pre:
    """Launch ``pre`` on the sums of x; h is weighted by ``given``, or else by H_pre."""
    sizes, ahead = Sizes.of(x), x.shape[:-2]
    kernel = ("pre" if variant.mixes else "pre_unmixed") + ("_k_blocks" if sums.blocks else "")
    inputs: dict[str, Array | None] = {
        "x": tokens(x, 2),
        "blocks" if sums.blocks else "partials": sums.array,
        "scale": scale,
        "bias": bias,
    }
    inputs["given"] = None if given is None else tokens(given, 1)
    outputs: dict[str, Out | None] = {
        "h": Out((*ahead, sizes.C), x.dtype),
        **mapped(ahead, sizes.n, bias.size, variant.mixes, saves),
    }
    chosen = {"GIVEN": given is not None, "SAVES": saves, **constants(variant)}
    chosen |= {"BLOCKS": sums.blocks, "SPLITS": launch.SPLITS_AT_ONCE}
    h, h_pre, h_post, *rest = kernels(kernel, inputs, outputs, sizes, settings(variant), **chosen)
    h_res = rest.pop(0) if variant.mixes else None
    return Pre(h, h_pre, h_post, h_res, tuple(rest))


def pre_norm(
    kernels: Kernels,
    x: Array,
    sums: Sums,
    scale: Array,
    bias: Array,
    given: Array | None,
    norm: Norm,
    variant: Variant,
    saves: bool = True,
) -> Pre:
    """Launch ``pre_norm`` on the sums of x, which is ``pre`` with a norm of h."""
    sizes, ahead = Sizes.of(x), x.shape[:-2]
    kernel = "pre_norm_k_blocks" if sums.blocks else "pre_norm"
    inputs: dict[str, Array | None] = {
        "x": tokens(x, 2),
        "blocks" if sums.blocks else "partials": sums.array,
        "scale": scale,
        "bias": bias,
        "given": None if given is None else tokens(given, 1),
        "h_norm_weight": norm.weight,
    }
    layer = Out((*ahead, sizes.C), x.dtype)
    outputs: dict[str, Out | None] = {
        "y": layer,
        "h": layer if norm.raw else None,
        **mapped(ahead, sizes.n, bias.size, variant.mixes, saves),
    }
    outputs.setdefault("h_res", None)
    chosen = {"GIVEN": given is not None, "RAW": norm.raw, "SAVES": saves, **constants(variant)}
    chosen |= {"MIXES": variant.mixes}
    chosen |= {"BLOCKS": sums.blocks, "SPLITS": launch.SPLITS_AT_ONCE}
    numbers = {**settings(variant), "h_norm_eps": norm.eps}
    y, *made = kernels(kernel, inputs, outputs, sizes, numbers, **chosen)
    raw = made.pop(0) if norm.raw else None
    h_pre, h_post, *rest = made
    h_res = rest.pop(0) if variant.mixes else None
    return Pre(y, h_pre, h_post, h_res, tuple(rest), raw)


# ---- pullbacks -----------------------------------------------------------------------------------


def weights_vjp(kernels: Kernels, x: Array, dh: Array) -> Array:
    """Return dw[T, n], the cotangents of each token's weights in h = sum_i w_i x_i."""
    sizes = Sizes.of(x)
    inputs = {"x": tokens(x, 2), "dh": tokens(dh, 1)}
    outputs = {"dw": Out((sizes.T, sizes.n), FLOAT32)}
    return kernels.over_channels(*kernels("weights_vjp", inputs, outputs, sizes))[0]


class ThroughNorm(NamedTuple):
    """The cotangents of h, in float32, and of its weights; the gradient of the norm's weight."""

    dh: Array
    dw: Array
    dweight: Array


def weights_norm_vjp(
    kernels: Kernels, x: Array, w: Array, norm: Norm, g: Array, g_raw: Array | None
) -> ThroughNorm:
    """Pull back the cotangents of the normalised h, and of h itself, without a pass over h."""
    sizes = Sizes.of(x)
    inputs = {
        "x": tokens(x, 2),
        "w": tokens(w, 1),
        "h_norm_weight": norm.weight,
        "g": tokens(g, 1),
        "g_raw": tokens(g if g_raw is None else g_raw, 1),
    }
    shares = launch.shares("weights_norm_vjp", *sizes, kernels.dialect)
    outputs = {
        "dh": Out((sizes.T, sizes.C), FLOAT32),  # which nothing rounds
        "dw": Out((sizes.T, sizes.n), FLOAT32),
        "dh_norm_weight": Out((shares, sizes.C), FLOAT32),
    }
    numbers = {"h_norm_eps": norm.eps}
    dh, dw, parts = kernels(
        "weights_norm_vjp", inputs, outputs, sizes, numbers, RAW=g_raw is not None
    )
    dweight = kernels.sum_rows(parts).reshape(norm.weight.shape)
    return ThroughNorm(dh, dw, kernels.host.cast(dweight, norm.weight.dtype))


class Local(NamedTuple):
    """The results of the part of a vjp that works on each token separately.

    du is the cotangent of u, and ``pull`` the factor of x in dx that comes from the root mean
    square; ``terms`` must be summed over the tokens: dbias first, then dscale.
    """

    du: Array
    pull: Array
    terms: Array


def local_vjp(
    kernels: Kernels,
    name: str,
    inputs: dict[str, Array],
    sizes: Sizes,
    groups: int,
    numbers: Mapping[str, float] | None = None,
    /,
    **constants: int,
) -> Local:
    """Launch ``mappings_vjp``, ``mappings_unmixed_vjp`` or ``head_vjp``."""
    columns = inputs["bias"].size
    outputs = {
        "du": Out((sizes.T, columns), FLOAT32),
        "pull": Out((sizes.T, 1), FLOAT32),
        "terms": Out((sizes.T, columns + groups), FLOAT32),
    }
    constants["K"] = sizes.n * sizes.C * kernels.devices
    return Local(*kernels(name, inputs, outputs, sizes, numbers, **constants))


def summed(kernels: Kernels, terms: Array, scale: Array, bias: Array) -> tuple[Array, Array]:
    """Return dscale and dbias, the sums of the rows of ``terms``."""
    total = kernels.sum_rows(terms)[0]
    cast = kernels.host.cast
    return cast(total[bias.size :], scale.dtype), cast(total[: bias.size], bias.dtype)


class Streams(NamedTuple):
    """The inputs of the combine that made the streams of a projection."""

    x: Array
    y: Array
    h_post: Array
    h_res: Array | None


def projection_pullback(
    kernels: Kernels,
    x: Array,
    phi: Array,
    local: Local,
    out: Out,
    w: Array | None = None,
    dh: Array | None = None,
    g: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx, dphi and the terms of dscale and dbias; dx includes w_i dh and g if given.

    The terms are those of ``local``, or sums of as many of these as a tile of tokens has.
    """
    if _one_pass(kernels, x, phi, dh, g):
        dx, dphi, terms, *_ = _project_vjp(kernels, x, phi, local, out, w, dh, g)
        return dx, dphi, terms
    sizes, nothing = Sizes.of(x), local.pull
    flat = tokens(x, 2)
    inputs = {
        "x": flat,
        "phi": phi,
        "du": local.du,
        "pull": local.pull,
        "w": nothing if w is None else tokens(w, 1),
        "dh": nothing if dh is None else tokens(dh, 1),
        "g": nothing if g is None else tokens(g, 2),
    }
    chosen = {"COLUMNS": phi.shape[0], "WITH_H": w is not None, "WITH_G": g is not None}
    (dx,) = kernels("project_dx", inputs, {"dx": out}, sizes, **chosen)

    shares = launch.shares("project_dphi", *sizes, kernels.dialect)
    partial = Out((shares, *phi.shape), FLOAT32)
    tiles = column_tiles(phi.shape[0], DPHI_COLUMNS)
    stage, _ = staging(kernels, "project_dphi", x, tiles, DPHI_STEPS, 2)
    inputs = {"x": flat, "du": local.du}
    chosen = {"COLUMN_TILES": tiles, "AHEAD": dtype_name(x.dtype) != FLOAT32}
    (dphi,) = kernels("project_dphi", inputs, {"dphi": partial}, sizes, None, stage, **chosen)
    return dx, kernels.sum_to(dphi, phi, 2), local.terms


def _one_pass(
    kernels: Kernels,
    x: Array,
    phi: Array,
    dh: Array | None,
    g: Array | None,
    combines: bool = False,
) -> bool:
    """Return whether ``project_vjp`` can make dx and dphi: CUDA's dialect alone has it."""
    sizes = Sizes.of(x)
    if kernels.dialect != "cuda" or dtype_name(x.dtype) != "bfloat16":
        return False
    if not launch.slabs(sizes.n, sizes.C) or phi.shape[0] > MOST_COLUMNS:
        return False
    return _slab_bytes(sizes, phi, dh, g, combines)[1] <= kernels.memory


def _slab_bytes(
    sizes: Sizes, phi: Array, dh: Array | None, g: Array | None, combines: bool
) -> tuple[int, int]:
    size = 0 if dh is None else launch.ITEMSIZE[dtype_name(dh.dtype)]
    return launch.slab_bytes(sizes.n, phi.shape[0], size, g is not None, combines)


def _project_vjp(
    kernels: Kernels,
    x: Array,
    phi: Array,
    local: Local,
    out: Out,
    w: Array | None,
    dh: Array | None,
    g: Array | None,
    streams: Streams | None = None,
) -> list[Array]:
    """Launch ``vjp_tiles`` and ``project_vjp``: dx, dphi and the terms of dscale and dbias.

    With ``streams``, dx is that of the x in x' = combine(streams), and dy and the cotangents of
    H_res and h_post, one row per token, are last.
    """
    sizes, columns, nothing = Sizes.of(x), phi.shape[0], local.pull
    n, combines = sizes.n, streams is not None
    record = launch.tile_record(n, columns, combines)
    inputs = {
        "du": local.du,
        "pull": local.pull,
        "w": nothing if w is None else tokens(w, 1),
        "h_post": nothing if streams is None else tokens(streams.h_post, 1),
        "h_res": nothing if streams is None else tokens(streams.h_res, 2),
        "terms": local.terms,
    }
    count = -(-sizes.T // launch.TILE_TOKENS)
    outputs: dict[str, Out | None] = {
        "tiles": Out((count, record), FLOAT32),
        "sums": Out((count, local.terms.shape[1]), FLOAT32),
    }
    chosen = {"COLUMNS": columns, "WITH_H": w is not None, "COMBINES": combines}
    tiles, terms = kernels("vjp_tiles", inputs, outputs, sizes, **chosen)

    shares = launch.shares("project_vjp", *sizes, kernels.dialect)
    stages, size = _slab_bytes(sizes, phi, dh, g, combines)
    given: dict[str, Array | None] = {
        "x": tokens(x, 2),
        "phi": phi,
        "tiles": tiles,
        "dh": nothing if dh is None else tokens(dh, 1),
        "g": nothing if g is None else tokens(g, 2),
        "old": None if streams is None else tokens(streams.x, 2),
        "y": None if streams is None else tokens(streams.y, 1),
    }
    mixed = Out((launch.slabs(n, sizes.C), sizes.T, n * n + n), FLOAT32)
    outputs = {
        "dx": out,
        "dphi": Out((shares, *phi.shape), FLOAT32),
        "dy": None if streams is None else Out.like(streams.y),
        "dmix": None if streams is None else mixed,
    }
    chosen |= {"WITH_G": g is not None, "STAGES": stages}
    stage = Stage(0, 0, size)
    dx, dphi, *rest = kernels("project_vjp", given, outputs, sizes, None, stage, **chosen)
    made = [dx, kernels.sum_to(dphi, phi, 2), terms]
    if streams is None:
        return made
    dy, dmix = rest
    outputs = {
        "dh_res": Out((sizes.T, n, n), FLOAT32),
        "dh_post": Out((sizes.T, n), FLOAT32),
    }
    return [*made, dy, *kernels("sum_slabs", {"dmix": dmix}, outputs, sizes)]


class Cotangents(NamedTuple):
    """The cotangents of the mappings; of h, with its weights; and of x, to add to the result."""

    h_pre: Array
    h_post: Array
    h_res: Array | None
    w: Array | None = None
    h: Array | None = None
    x: Array | None = None


def pullback(
    kernels: Kernels,
    x: Array,
    phi: Array,
    scale: Array,
    bias: Array,
    projected: Projected,
    given: Cotangents,
    variant: Variant,
    out: Out,
) -> tuple[Array, Array, Array, Array]:
    """Return dx, dphi, dscale and dbias of the mappings of x, and of h if it has a cotangent."""
    local = _mappings_vjp(kernels, x, scale, bias, projected, given, variant)
    dx, dphi, terms = projection_pullback(kernels, x, phi, local, out, given.w, given.h, given.x)
    return dx, dphi, *summed(kernels, terms, scale, bias)


def combined_pullback(
    kernels: Kernels,
    streams: Streams,
    x_new: Array,
    phi: Array,
    scale: Array,
    bias: Array,
    projected: Projected,
    given: Cotangents,
    variant: Variant,
) -> tuple[Array | None, ...]:
    """Pull back through the mappings of x' = combine(streams), and through the combine.

    The gradients are of x, y, h_post, H_res, phi, scale and bias. The cotangent of x' stays in
    float32 in between, as nothing rounds it there.
    """
    x, y, h_post, h_res = streams
    w, dh, g = given.w, given.h, given.x
    local = _mappings_vjp(kernels, x_new, scale, bias, projected, given, variant)
    if h_res is not None and _one_pass(kernels, x_new, phi, dh, g, combines=True):
        dx, dphi, terms, dy, dh_res, dh_post = _project_vjp(
            kernels, x_new, phi, local, Out.like(x), w, dh, g, streams
        )
        dh_post, dh_res = kernels.over_channels(dh_post, dh_res)
        mixing = kernels.sum_to(dh_post, h_post, 1), kernels.sum_to(dh_res, h_res, 2)
        return dx, dy, *mixing, dphi, *summed(kernels, terms, scale, bias)
    between = Out(x.shape, FLOAT32)
    dx_new, dphi, terms = projection_pullback(kernels, x_new, phi, local, between, w, dh, g)
    ends = summed(kernels, terms, scale, bias)
    return *combine.vjp(kernels, (x, y, h_post, h_res), (dx_new,)), dphi, *ends


def _mappings_vjp(
    kernels: Kernels,
    x: Array,
    scale: Array,
    bias: Array,
    projected: Projected,
    given: Cotangents,
    variant: Variant,
) -> Local:
    inputs = {
        "u": tokens(projected.u, 1),
        "r": tokens(projected.r, 1),
        "scale": scale,
        "bias": bias,
        "g_pre": tokens(given.h_pre, 1),
        "g_post": tokens(given.h_post, 1),
    }
    own, chosen = settings(variant), constants(variant)
    kernel = "mappings_unmixed_vjp"
    if given.h_res is not None:
        kernel, inputs["g_res"] = "mappings_vjp", tokens(given.h_res, 2)
    return local_vjp(kernels, kernel, inputs, Sizes.of(x), scale.size, own, **chosen)
