"""Triton kernels of the fused layer. Imported by `fused_triton` alone, when a kernel starts: it needs Triton.

Shapes: B pictures, P pixels, I channels in, O channels out. A picture's or a row's number is made 64 bits wide before
it is multiplied by a stride: a batch of pictures has more than 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    noise: tl.tensor,
    y: tl.tensor,
    batch: tl.tensor,
    points: tl.tensor,
    channels_in: tl.tensor,
    channels_out: tl.tensor,
    x_picture: tl.tensor,
    x_row: tl.tensor,
    weight_picture: tl.tensor,
    weight_row: tl.tensor,
    noise_picture: tl.tensor,
    slope: tl.tensor,
    SHARED: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """y_BPO = leaky_relu(x_BPI @ weight_BIO + bias_O + noise_BP, slope), tile by tile.

    x, weight, y: tensor descriptors with BULK (Hopper's copy engine moves whole tiles, and pads and clips them), else
    pointers. As many programs as the device runs at once walk over the tiles. With BULK the loops are flattened: the
    loads of the next tile are under way while this one's result is written.
    """
    tiles_p = tl.cdiv(points, BLOCK_P)
    tiles_o = tl.cdiv(channels_out, BLOCK_O)
    steps = tl.cdiv(channels_in, BLOCK_I)
    for tile in tl.range(tl.program_id(0), batch * tiles_p * tiles_o, tl.num_programs(0), flatten=BULK):
        # Neighbours in time share what they read, through the L2 cache: first all channels of the same pixels, then
        # the next pixels with the same weights. Pixels that all pictures share are read once for all pictures.
        first_o = (tile % tiles_o) * BLOCK_O
        rest = tile // tiles_o
        if SHARED:
            picture = rest % batch
            first_p = (rest // batch) * BLOCK_P
            x_of = picture * 0
        else:
            picture = rest // tiles_p
            first_p = (rest % tiles_p) * BLOCK_P
            x_of = picture
        # Of a tile's elements the 64-bit part of the address is common: the rest fits 32 bits and half the registers.
        tile_p, tile_o = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_O)
        p, o = first_p + tile_p, first_o + tile_o
        total = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
        for step in range(steps):
            first_i = step * BLOCK_I
            if BULK:
                rows = x.load([x_of, first_p, first_i]).reshape(BLOCK_P, BLOCK_I)
                columns = weight.load([picture, first_i, first_o]).reshape(BLOCK_I, BLOCK_O)
            else:
                tile_i = tl.arange(0, BLOCK_I)
                i = first_i + tile_i
                rows = tl.load(
                    x
                    + (x_of.to(tl.int64) * x_picture + first_p.to(tl.int64) * x_row + first_i)
                    + (tile_p[:, None] * x_row + tile_i[None, :]),
                    mask=(p[:, None] < points) & (i[None, :] < channels_in),
                    other=0.0,
                )
                columns = tl.load(
                    weight
                    + (picture.to(tl.int64) * weight_picture + tl.cast(first_i, tl.int64) * weight_row + first_o)
                    + (tile_i[:, None] * weight_row + tile_o[None, :]),
                    mask=(i[:, None] < channels_in) & (o[None, :] < channels_out),
                    other=0.0,
                )
            total = tl.dot(rows, columns, total, input_precision=PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + o, mask=o < channels_out, other=0.0)[None, :]
        if HAS_NOISE:
            noise_at = picture.to(tl.int64) * noise_picture + p
            total += tl.load(noise + noise_at, mask=p < points, other=0.0)[:, None]
        total = tl.where(total > 0.0, total, total * slope)
        if BULK:
            y.store([picture, first_p, first_o], total.to(y.dtype).reshape(1, BLOCK_P, BLOCK_O))
        else:
            tl.store(
                y
                + ((picture.to(tl.int64) * points + first_p) * channels_out + first_o)
                + (tile_p[:, None] * channels_out + tile_o[None, :]),
                total.to(y.dtype.element_ty),
                mask=(p[:, None] < points) & (o[None, :] < channels_out),
            )


@triton.jit
def activation_backward_kernel(
    gradient: tl.tensor,
    y: tl.tensor,
    product_gradient: tl.tensor,
    bias_parts: tl.tensor,
    noise_parts: tl.tensor,
    batch: tl.tensor,
    points: tl.tensor,
    channels: tl.tensor,
    gradient_picture: tl.tensor,
    gradient_row: tl.tensor,
    y_picture: tl.tensor,
    y_row: tl.tensor,
    slope: tl.tensor,
    ACTIVE: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_NOISE: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """LeakyReLU's gradient and its sums in one pass; each program has ROUNDS * BLOCK_P pixels of one picture.

    bias_parts (programs of all pixels, O) and noise_parts (tiles of channels, B, P) are summed by the caller: adding
    to a common total from here would add in another order each time.
    """
    tiles_o = tl.cdiv(channels, BLOCK_O)
    parts = tl.cdiv(points, ROUNDS * BLOCK_P)
    tile_o = tl.program_id(0) % tiles_o
    row = tl.program_id(0) // tiles_o  # of bias_parts
    picture = (row // parts).to(tl.int64)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    for turn in range(ROUNDS):
        p = ((row % parts) * ROUNDS + turn) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p[:, None] < points) & (o[None, :] < channels)
        gradient_at = picture * gradient_picture + p.to(tl.int64)[:, None] * gradient_row + o[None, :]
        g = tl.load(gradient + gradient_at, mask=inside, other=0.0)
        if ACTIVE:
            y_at = picture * y_picture + p.to(tl.int64)[:, None] * y_row + o[None, :]
            above = tl.load(y + y_at, mask=inside, other=0.0).to(tl.float32) > 0.0
            g = tl.where(above, g, (g.to(tl.float32) * slope).to(g.dtype))
            tl.store(product_gradient + (picture * points + p)[:, None] * channels + o[None, :], g, mask=inside)
        if NEED_BIAS:
            total += g.to(tl.float32)
        if NEED_NOISE:
            noise_at = (tile_o.to(tl.int64) * batch + picture) * points + p
            tl.store(noise_parts + noise_at, tl.sum(g.to(tl.float32), axis=1), mask=p < points)
    if NEED_BIAS:
        tl.store(bias_parts + row.to(tl.int64) * channels + o, tl.sum(total, axis=0), mask=o < channels)
