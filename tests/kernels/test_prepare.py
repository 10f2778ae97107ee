"""The Hopper execution layout, decoded back brick by brick as the kernel reads it."""

import pytest
import torch

from quantkit.formats import mxfp4
from quantkit.kernels import prepare

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fold(code: int, exponent: int) -> int:
    """The E5M2 byte that `fold_e2m1` in sm90_formats.cuh makes of a code, instruction by step."""
    low = exponent * 0x04040400 + 0x1E1C1800 & 0xFFFFFFFF
    high = exponent * 0x04040404 + 0x26242220 & 0xFFFFFFFF
    table = (low | high << 32).to_bytes(8, "little")
    return table[code & 7] | (code >> 3) << 7


def e5m2(byte: int) -> float:
    return torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e5m2).float().item()


def test_the_fold_is_exact_for_every_code_and_exponent():
    for exponent in range(16):
        for code in range(16):
            value = MAGNITUDES[code & 7] * (-1) ** (code >> 3)
            assert e5m2(fold(code, exponent)) == value * 2.0 ** (exponent - 8)


def decode_brick(brick: bytes) -> torch.Tensor:
    """One brick to [64, 128] values relative to the row scale, thread by thread."""
    out = torch.full((64, 128), torch.nan, dtype=torch.float64)
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        exponents = brick[4096 + thread // 4 * 4 :][:4]
        for step in range(4):
            quad = brick[step // 2 * 2048 + thread * 16 :][:16]
            for hi in range(2):
                word = int.from_bytes(quad[(step % 2 * 2 + hi) * 4 :][:4], "little")
                exponent = exponents[hi * 2 + step // 2] >> step % 2 * 4 & 15
                for half in range(2):
                    for i in range(4):
                        magnitude = word >> 4 * (4 * half + i) & 7
                        sign = word >> (8 * i + 7 - 4 * half) & 1
                        value = e5m2(fold(magnitude | sign << 3, exponent))
                        out[warp * 16 + hi * 8 + g, step * 32 + half * 16 + 4 * t + i] = value
    return out


def decode_branch_brick(brick: bytes, dtype: torch.dtype) -> torch.Tensor:
    """One branch brick to [64, columns]."""
    out = torch.zeros(64, 64, dtype=torch.uint8)
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for step in range(2):
            registers = brick[step * 2048 + thread * 16 :][:16]
            for register in range(4):  # row g, g + 8, then the other half of K
                row, at = warp * 16 + register % 2 * 8 + g, step * 32 + register // 2 * 16 + 4 * t
                part = torch.tensor(list(registers[register * 4 :][:4]), dtype=torch.uint8)
                out[row, at : at + 4] = part
    return out.view(dtype).double()


def decode(prepared: prepare.Prepared) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] and branch [out, columns] of all planes, scales applied."""
    main = torch.zeros(prepared.out_features, prepared.bricks * 128, dtype=torch.float64)
    branch = torch.zeros(0)
    for plane in prepared.planes:
        bricks = plane.weights.numpy()
        main_rows = torch.cat(
            [
                torch.cat([decode_brick(b.tobytes()) for b in block[: prepared.bricks]], 1)
                for block in bricks
            ]
        )
        main_rows *= plane.rows[:, :1].double().abs()  # the sign says something else
        if plane.index is None:
            main += main_rows[: prepared.out_features]
        else:
            main[plane.index] += main_rows[: len(plane.index)]
            assert not main_rows[len(plane.index) :].any()
        if prepared.branch and plane.index is None:
            dtype = torch.bfloat16 if prepared.branch == "bf16" else torch.float8_e4m3fn
            side = torch.cat(
                [
                    torch.cat(
                        [decode_branch_brick(b.tobytes(), dtype) for b in block[prepared.bricks :]],
                        1,
                    )
                    for block in bricks
                ]
            )
            branch = (side * plane.rows[:, :1].double().abs() * plane.rows[:, 2:3].double())[
                : prepared.out_features
            ]
    return main[:, : prepared.in_features], branch


def random_layer(rows: int, columns: int, low: int, high: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(low, high, (rows, columns // 32), generator=generator)
    return packed, scale.to(torch.uint8)


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (70, 192), (8, 32)])
def test_every_element_is_where_the_kernel_reads_it(rows, columns):
    packed, scale = random_layer(rows, columns, 110, 126)
    packed[3, :16] = 0  # a block of zeros, at an exponent far away
    scale[3, 0] = 1
    packed[5] = 0
    prepared = prepare.prepare_mxfp4(packed, scale)
    assert len(prepared.planes) == 1
    assert prepared.planes[0].weights.shape[1:] == (-(-columns // 128), prepare.BRICK_BYTES)
    main, _ = decode(prepared)
    assert torch.equal(main, mxfp4.dequantize(packed, scale).double())


def test_rows_whose_block_scales_lie_far_apart_are_marked():
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    weight[5, :32] *= 1024  # sums of the other blocks would end below its bits
    weight[6, : 8 * 32] /= 64  # a sixteenth of the blocks
    weight[7, : 9 * 32] /= 64
    weight[8] = 0
    prepared = prepare.prepare_mxfp4(*mxfp4.quantize(weight, "even"))
    assert (prepared.planes[0].rows[:, 0] < 0).nonzero()[:, 0].tolist() == [5, 7]
    main, _ = decode(prepared)
    assert torch.equal(main, mxfp4.fake_quantize(weight, "even").double())


def test_rows_that_span_more_than_sixteen_octaves_take_further_planes():
    packed, scale = random_layer(70, 128, 120, 122)
    packed |= 0x11  # no block of zeros
    scale[7] = torch.tensor([200, 180, 150, 184], dtype=torch.uint8)  # 50 octaves: three planes
    scale[69, 2] = 121 - 16
    scale[20, 3] = scale[20, :3].max() - 15  # just fits
    prepared = prepare.prepare_mxfp4(packed, scale)
    assert prepare.wide_rows(packed, scale) == 2
    assert [None if p.index is None else p.index.tolist() for p in prepared.planes] == [
        None,
        [7, 69],
        [7],
    ]
    main, _ = decode(prepared)
    assert torch.equal(main, mxfp4.dequantize(packed, scale).double())


def test_a_nan_scale_makes_the_row_nan():
    packed, scale = random_layer(64, 128, 120, 124)
    scale[9, 1] = 255
    rows = prepare.prepare_mxfp4(packed, scale).planes[0].rows
    assert rows[:, 0].isnan().nonzero().tolist() == [[9]]


@pytest.mark.parametrize(("branch", "k"), [("bf16", 16), ("bf16", 48), ("fp8", 80)])
def test_branch_and_bias(branch, k):
    packed, scale = random_layer(70, 128, 116, 124)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(70, k, generator=generator)
    own = None
    if branch == "bf16":
        weight = weight.to(torch.bfloat16)
        expected = weight.double()
    else:
        own = torch.rand(70, 1, generator=generator) + 0.1
        weight = weight.to(torch.float8_e4m3fn)
        expected = weight.double() * own.double()
    bias = torch.randn(70, generator=generator).to(torch.bfloat16)
    index = torch.arange(k, dtype=torch.int32)
    prepared = prepare.prepare_mxfp4(
        packed,
        scale,
        bias=bias,
        outlier_weight=weight,
        outlier_scale=own,
        outlier_index=index,
    )
    columns = prepare.BRANCH_COLUMNS[branch]
    assert prepared.branch_bricks == -(-k // columns)
    assert prepared.outlier_index.tolist() == list(range(k)) + [-1] * (-k % columns)
    main, side = decode(prepared)
    assert torch.equal(main, mxfp4.dequantize(packed, scale).double())
    assert torch.equal(side[:, k:], torch.zeros_like(side[:, k:]))
    # the FP8 branch's factor is a float32 quotient
    assert torch.allclose(side[:, :k], expected, rtol=0 if branch == "bf16" else 1e-6, atol=0)
    assert torch.equal(prepared.planes[0].rows[:70, 1], bias.float())
    assert not prepared.planes[0].rows[70:, 1].any()
