"""Expert layers with random weights on any device, and what they compute by definition."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch.nn import functional

from engines.kernels import PackedLinear, Router, RoutingRule, reference
from engines.kernels.experts import Stacks, uniform_scores
from engines.models.batch import Batch

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    tokens: int
    width: int
    inner: int
    experts: int
    chosen: int
    shared: int


class ExpertCase:
    """One layer and one step. ``padding`` tokens, spread over the step, only fill it up: their stream is NaN."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        padding: int = 0,
        stacks: Stacks | None = None,
    ) -> None:
        self.shape, number = shape, shape.experts + shape.shared
        tokens, width, inner = shape.tokens, shape.width, shape.inner

        def noise(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, device=device).mul_(sizes[-1] ** -0.5)

        self.hidden = torch.randn(tokens, width, device=device).bfloat16() * 3
        self.gain = (torch.rand(width, device=device) + 0.5).bfloat16()
        self.stacks = stacks or Stacks(
            noise(number, 2 * inner, width).bfloat16() * 3,
            noise(number, width, inner).bfloat16(),
            shape.chosen,
            shape.shared,
        )
        weight = PackedLinear(noise(shape.experts, width) * 3, "plain", shape.experts, width)
        self.router = Router(weight, None, RoutingRule(shape.chosen))
        slots = torch.arange(tokens, device=device)
        self.padding = torch.randperm(tokens, device=device)[:padding]
        slots[self.padding] = -1
        self.hidden[self.padding] = torch.nan
        integers = torch.zeros(1, dtype=torch.int32, device=device)
        self.batch = Batch(
            token_ids=torch.randint(1000, (tokens,), device=device),
            positions=torch.randint(5000, (tokens,), device=device),
            cache_slots=slots,
            query_starts=integers,
            context_lengths=integers,
            block_tables=integers,
            decode_rows=None,
            longest_query=1,
            longest_context=1,
        )

    def with_rule(self, **changes: object) -> Router:
        return dataclasses.replace(self.router, rule=dataclasses.replace(self.router.rule, **changes))  # type: ignore[arg-type]

    @property
    def real(self) -> torch.Tensor:
        """Numbers of the tokens that are not padding."""
        return (self.batch.cache_slots >= 0).nonzero()[:, 0]

    def normed(self) -> torch.Tensor:
        return reference.rms_norm(self.hidden, self.gain, EPS)

    def scores(self, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, experts) float64: what weights are taken of, and what ranks the experts."""
        scores = (self.normed().double() @ router.weight.weight.double().t()).softmax(dim=-1)
        layer = router.rule.uniform_layer
        if layer is None:
            return scores, scores
        return scores, uniform_scores(self.batch.positions, self.batch.token_ids, layer, self.shape.experts).double()

    def expected(self, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The stream after the layer, float32, of this choice: (T, columns) weights and experts, -1 none."""
        x, total = self.normed().float(), self.hidden.float()
        for expert in range(self.stacks.gate_up.shape[0]):
            token, column = (experts == expert).nonzero(as_tuple=True)
            if token.numel():
                gate, up = (x[token] @ self.stacks.gate_up[expert].float().t()).chunk(2, dim=1)
                product = (functional.silu(gate) * up) @ self.stacks.down[expert].float().t()
                total = total.index_add(0, token, product * weights[token, column].unsqueeze(1))
        return total

    def expected_of(self, router: Router) -> torch.Tensor:
        """The stream after the layer as the kernels choose, whose choice another test looks at."""
        from engines.kernels.cuda.routing import choose_experts
        from engines.kernels.cuda.scratch import counters

        device, shared = self.hidden.device, self.shape.shared
        routed = choose_experts(
            self.hidden, self.gain, EPS, router, shared, self.batch, counters(device), count=False, early=False
        )
        return self.expected(routed.weights, routed.experts)
