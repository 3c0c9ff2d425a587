"""Linear layers of few rows on the GPU: every way that the kernel runs, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from engines import kernels
from engines.kernels import Fusion, RmsNorm, Stream
from engines.kernels.cuda.tuning import SkinnyConfig, SkinnyShape, config_for, machine_of, ranked
from tests.linear_cases import EPS, LinearCase

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = torch.device("cuda", 0)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FUSED: list[dict[str, bool]] = [
    {"norm": True, "bias": True, "gated": True, "residual": True},
    {"norm": True},
    {"residual": True},
]
CONFIGS = [
    SkinnyConfig(16, 256, 4, 1, 4, 4, 512, True),
    SkinnyConfig(16, 512, 8, 1, 8, 4, 0, False),
    SkinnyConfig(32, 256, 4, 3, 4, 4, 1024, True),
    SkinnyConfig(64, 128, 4, 2, 4, 3, 0, True),
    SkinnyConfig(64, 128, 0, 1, 4, 4, 512, True),
    SkinnyConfig(64, 128, 0, 4, 4, 4, 256, False),
    SkinnyConfig(128, 64, 0, 2, 4, 4, 0, True),
    SkinnyConfig(128, 64, 0, 1, 8, 3, 2048, True),
]


def runs_here(config: SkinnyConfig) -> bool:
    return machine_of(0).hopper or (config.parts > 0 and not config.early)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("config", CONFIGS)
def test_configurations(config: SkinnyConfig, fused: dict[str, bool]) -> None:
    if not runs_here(config):
        pytest.skip("needs a Hopper GPU")
    for rows, lines, depth in ((3, 200, 1072), (8, 66, 2096), (16, 4608, 3584)):
        case = LinearCase.draw(rows, lines, depth, torch.bfloat16, DEVICE, **fused)
        first = case.run(config)
        assert case.distance(first) < TOLERANCE[torch.bfloat16], (rows, lines, depth)
        for _ in range(3):
            assert torch.equal(case.run(config), first), "differs from run to run"


@pytest.mark.parametrize(
    ("rows", "dtype"), [*((rows, torch.bfloat16) for rows in (1, 5, 16, 23, 63, 128)), (6, torch.float16)]
)
def test_what_the_machine_chooses(rows: int, dtype: torch.dtype) -> None:
    """The best by the model, and what ``linear`` runs, with norm and without."""
    for fused in FUSED:
        norm, gated = fused.get("norm", False) and dtype is torch.bfloat16, fused.get("gated", False)
        case = LinearCase.draw(rows, 1408, 2048, dtype, DEVICE, **(fused | {"norm": norm}))
        for config in ranked(SkinnyShape(1408, 2048, gated, norm), rows, machine_of(0), 2):
            assert case.distance(case.run(config)) < TOLERANCE[dtype], config
        fusion = Fusion(None if case.gain is None else RmsNorm(case.gain, EPS), gated, case.residual)
        result = kernels.linear(case.x, kernels.pack_linear(case.weight), case.bias, fusion)
        assert case.distance(result) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]])
def test_more_tiles_than_run_at_once(config: SkinnyConfig) -> None:
    """Programs then also ask for the weights of the tiles that follow."""
    if not runs_here(config):
        pytest.skip("needs a Hopper GPU")
    case = LinearCase.draw(4, 70_002, 528, torch.bfloat16, DEVICE, norm=True, gated=True)
    assert case.distance(case.run(config)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("config", CONFIGS)
def test_handed_over_norms(config: SkinnyConfig) -> None:
    """What one layer hands over, and a layer to which it was."""
    if not runs_here(config):
        pytest.skip("needs a Hopper GPU")
    for rows, lines, depth in ((1, 200, 1072), (8, 1544, 2096), (16, 4608, 3584), (32, 2048, 1536)):
        writer = LinearCase.draw(rows, lines, depth, torch.bfloat16, DEVICE, residual=True)
        handover = writer.empty_handover(config)
        hidden = writer.run(config, handover=handover)
        assert torch.equal(hidden, writer.run(config)), (rows, lines, depth)
        writer.check_handover(hidden, handover)
        squares = handover.squares.clone()
        for _ in range(3):
            writer.run(config, handover=handover)
            assert torch.equal(handover.squares, squares), "differs from run to run"
        for gated in (False, True):
            reader = LinearCase.draw(rows, lines, depth, torch.bfloat16, DEVICE, norm=True, bias=True, gated=gated)
            for parts in (1, depth // 64, depth // 16):
                assert reader.distance(reader.run(config, parts=parts)) < TOLERANCE[torch.bfloat16], parts


@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 128, 200])
def test_a_stream_in_a_graph(rows: int) -> None:
    """Blocks of two layers as models have them: each norm is handed over or not, as rows and tables say."""
    width, inner, blocks = 1536, 2048, 8
    gains = [torch.randn(width).to(DEVICE, torch.bfloat16) for _ in range(blocks)]
    norms = [RmsNorm(gain, EPS) for gain in gains]
    wide = [(torch.randn(2 * inner, width) / width**0.5).to(DEVICE, torch.bfloat16) for _ in range(blocks)]
    narrow = [(torch.randn(width, inner) / inner**0.5).to(DEVICE, torch.bfloat16) for _ in range(blocks)]
    packed = [(kernels.pack_linear(one), kernels.pack_linear(other)) for one, other in zip(wide, narrow, strict=True)]
    x = torch.randn(rows, width).to(DEVICE, torch.bfloat16)
    handed: list[bool] = []

    def forward() -> torch.Tensor:
        stream = Stream(x.clone())
        for index, (norm, (gate_up, down)) in enumerate(zip(norms, packed, strict=True)):
            gated = kernels.linear(stream, gate_up, None, Fusion(norm=norm, gated=True))
            next_norm = norms[index + 1] if index + 1 < blocks else None
            stream = kernels.add_linear(gated, down, None, stream, next_norm)
            handed.append(stream.handover is not None)
        return stream.hidden

    forward()
    assert not handed[-1]
    if config_for(SkinnyShape(width, inner, False, False), min(rows, 128), machine_of(0)) is None or rows > 128:
        assert not any(handed)
    elif rows <= 8:
        assert all(handed[:-1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward()
    for _ in range(5):
        x.copy_(torch.randn(rows, width))
        graph.replay()
        first = result.clone()
        graph.replay()
        assert torch.equal(result, first), "differs from run to run"
        expected = x.double()
        for gain, gate_up, down in zip(gains, wide, narrow, strict=True):
            normed = expected * torch.rsqrt(expected.square().mean(-1, keepdim=True) + EPS) * gain.double()
            gate, up = (normed @ gate_up.double().t()).chunk(2, -1)
            expected = expected + (torch.nn.functional.silu(gate) * up) @ down.double().t()
        assert float((result.double() - expected).norm() / expected.norm()) < 2e-2


def test_float32_results_are_not_rounded() -> None:
    case = LinearCase.draw(4, 512, 1024, torch.bfloat16, DEVICE)
    packed = kernels.pack_linear(case.weight)
    result = kernels.linear(case.x, packed, fusion=Fusion(dtype=torch.float32))
    assert result.dtype is torch.float32
    if config_for(SkinnyShape(512, 1024, False, False), 4, machine_of(0)) is not None:
        assert case.distance(result) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [4, 200])
def test_float32_results_go_where_they_are_wanted(rows: int) -> None:
    """Many rows are cuBLAS's, whose sums must not pass through 16 bits either."""
    case = LinearCase.draw(rows, 1000, 1024, torch.bfloat16, DEVICE, norm=rows == 4)
    wanted = torch.full((rows + 1, 1000), torch.nan, device=DEVICE)
    norm = None if case.gain is None else RmsNorm(case.gain, EPS)
    result = kernels.linear(
        case.x, kernels.pack_linear(case.weight), fusion=Fusion(norm, dtype=torch.float32, into=wanted[:rows])
    )
    assert result.data_ptr() == wanted.data_ptr()
    assert case.distance(wanted[:rows]) < (TOLERANCE[torch.float32] if rows == 200 else TOLERANCE[torch.bfloat16])
    assert wanted[rows].isnan().all()


@pytest.mark.parametrize("rows", [3, 40, 200])
def test_a_residual_may_be_overwritten(rows: int) -> None:
    case = LinearCase.draw(rows, 1536, 1024, torch.bfloat16, DEVICE, residual=True)
    expected = case.expected()
    result = kernels.linear(case.x, kernels.pack_linear(case.weight), fusion=Fusion(residual=case.residual, reuse=True))
    assert float((result.double() - expected).norm() / expected.norm()) < TOLERANCE[torch.bfloat16]


def test_extreme_activations_give_no_nan() -> None:
    case = LinearCase.draw(3, 256, 1536, torch.bfloat16, DEVICE, norm=True, gated=True)
    for size in (0.0, 1e-30, 1e15):
        case.x.copy_(torch.randn(3, 1536) * size)
        for config in filter(runs_here, CONFIGS):
            assert case.run(config).isfinite().all()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_chain_of_layers_in_a_graph(config: SkinnyConfig) -> None:
    """Each layer reads what the one before wrote: with early starts a missing wait would show."""
    if not runs_here(config):
        pytest.skip("needs a Hopper GPU")
    from engines.kernels.cuda.skinny import skinny_linear

    width, layers = 1024, 24
    weights = [(torch.randn(width, width) / width**0.5).to(DEVICE, torch.bfloat16) for _ in range(layers)]
    gain = torch.ones(width, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(7, width).to(DEVICE, torch.bfloat16)

    def chain() -> torch.Tensor:
        hidden = x
        for index, weight in enumerate(weights):
            norm = (gain, EPS) if index % 2 else None
            hidden = skinny_linear(hidden, weight, config, norm, residual=hidden)
        return hidden

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    for _ in range(10):
        x.copy_(torch.randn(7, width))
        graph.replay()
        expected = x.double()
        for index, weight in enumerate(weights):
            inner = expected
            if index % 2:
                inner = inner * torch.rsqrt(inner.square().mean(-1, keepdim=True) + EPS)
            expected = expected + inner @ weight.double().t()
            # Rounded where the kernel rounds, so that only its own error is measured.
            expected = expected.to(torch.bfloat16).double()
        assert float((result.double() - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "lines", "depth"), [(257, 208, 72), (1000, 5632, 2048), (4133, 17920, 1536)])
def test_products_of_many_rows_are_gated_where_they_are_summed(
    rows: int, lines: int, depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not machine_of(0).hopper:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr("engines.kernels.cuda.gated.FEWEST_WAVES", 0)
    case = LinearCase.draw(rows, lines, depth, dtype, DEVICE, gated=True)
    behind = torch.full((rows + 64, lines // 2), torch.nan, dtype=dtype, device=DEVICE)
    fusion = Fusion(gated=True, into=behind[:rows])
    result = kernels.linear(case.x, kernels.pack_linear(case.weight), fusion=fusion)
    assert case.distance(result) < TOLERANCE[dtype]
    assert bool(behind[rows:].isnan().all())
    assert torch.equal(kernels.linear(case.x, kernels.pack_linear(case.weight), fusion=Fusion(gated=True)), result)
