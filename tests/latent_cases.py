"""Steps of latent attention over a random paged cache, and what they give by definition."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from engines.kernels import LatentQueries, LatentUp, reference
from engines.models.batch import Batch
from tests.unit.kernels.paged import PagedCache, Row

EPS = 1e-6


@dataclass(frozen=True)
class Widths:
    heads: int
    nope: int
    value: int
    rank: int
    rope: int
    interleaved: bool


class LatentCase:
    """One step of one layer: rows of these contexts, each with as many tokens of them as ``counts`` says, else one,
    in shuffled lines of the block table.

    ``padding`` further rows of one token only fill the step up: their tokens and lines hold what nobody may read.
    """

    def __init__(
        self,
        contexts: list[int],
        widths: Widths,
        device: torch.device,
        padding: int = 0,
        counts: list[int] | None = None,
        fp8: bool = False,
    ) -> None:
        width, counts = widths.rank + widths.rope, counts or [1] * len(contexts)
        paged = PagedCache(len(contexts), max(contexts), [(width,)], 16, torch.bfloat16)
        slots = []
        for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
            # What this step writes, and what lies behind the row's end, is not there yet.
            (tensor,) = paged.forget_after(row, context - count)
            paged.tensors = (tensor,)
            slots.append(paged.slots(row, context)[context - count :])
        rows = [Row(row, *sizes) for row, sizes in enumerate(zip(contexts, counts, strict=True))]
        self._plain = dataclasses.replace(paged.batch(rows), cache_slots=torch.cat(slots))
        self.tokens, self.widths = sum(counts), widths
        self.before = paged.tensors[0]
        self.scales: torch.Tensor | None = None
        self._wide_scales = torch.ones(width)
        if fp8:
            # The rope part has a scale of its own.
            self._wide_scales = torch.cat([torch.full((widths.rank,), 2.0**-5), torch.full((widths.rope,), 2.0**-7)])
            self.before = reference.quantize(self.before, self._wide_scales)
            self.scales = self._wide_scales.to(device)
        self.cache = self.before.to(device, copy=True)
        self.batch = self._padded(padding, device)
        self.queries = torch.randn(self.tokens + padding, widths.heads, widths.nope + widths.rope).bfloat16()
        self.latents = torch.randn(self.tokens + padding, width).bfloat16()
        self.queries[self.tokens :], self.latents[self.tokens :] = torch.nan, torch.nan
        up = torch.randn(widths.heads, widths.nope + widths.value, widths.rank) * widths.rank**-0.5
        gain = (torch.rand(widths.rank) + 0.5).bfloat16()
        angles = torch.rand(max(contexts), widths.rope // 2) * 6
        self.shape = LatentQueries(
            up=LatentUp(widths.heads, widths.nope, widths.value, up.bfloat16().to(device), (), ()),
            latent_gain=gain.to(device),
            latent_eps=EPS,
            cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1).to(device),
            interleaved=widths.interleaved,
            scale=0.15,
        )
        self.queries, self.latents = self.queries.to(device), self.latents.to(device)

    @property
    def caches(self) -> tuple[torch.Tensor, ...]:
        """The layer's cache as ``kernels.latent_attention`` takes it."""
        return (self.cache,) if self.scales is None else (self.cache, self.scales)

    def _padded(self, padding: int, device: torch.device) -> Batch:
        plain, rows = self._plain, self._plain.context_lengths.shape[0]
        lines = torch.randperm(rows)
        tables = torch.full((rows + padding, plain.block_tables.shape[1]), 1 << 30, dtype=torch.int32)
        tables[lines] = plain.block_tables

        def filled(values: torch.Tensor, value: int) -> torch.Tensor:
            return torch.cat([values, values.new_full((padding,), value)]).to(device)

        return Batch(
            token_ids=filled(plain.token_ids, 0),
            positions=filled(plain.positions, 0),
            cache_slots=filled(plain.cache_slots, -1),
            query_starts=torch.cat(
                [plain.query_starts, self.tokens + torch.arange(1, padding + 1, dtype=torch.int32)]
            ).to(device),
            context_lengths=filled(plain.context_lengths, 0),
            block_tables=tables.to(device),
            decode_rows=(plain.decode_rows or 0) + padding,
            longest_query=plain.longest_query,
            longest_context=plain.longest_context + 200,
            table_rows=filled(lines.int(), rows if padding else 0),
        )

    def _written(self) -> torch.Tensor:
        """The cache after the step, by definition."""
        rank, plain = self.widths.rank, self._plain
        entries = self.latents[: self.tokens].cpu().clone()
        entries[:, :rank] = reference.rms_norm(entries[:, :rank], self.shape.latent_gain.cpu(), EPS)
        turned = entries[:, rank:].unsqueeze(1)
        reference.rope_(turned, turned[:, :0], plain.positions, self.shape.cos_sin.cpu(), self.widths.interleaved)
        if self.scales is not None:
            entries = reference.quantize(entries, self._wide_scales)
        cache = self.before.clone()
        reference.write_cache(entries, cache, plain.cache_slots)
        return cache

    def expected(self) -> torch.Tensor:
        """(tokens, heads * value) float64."""
        widths, up = self.widths, self.shape.up.stacked
        assert up is not None
        up = up.cpu().double()
        queries = self.queries[: self.tokens].cpu().double()
        turned = queries[..., widths.nope :]
        positions, table = self._plain.positions, self.shape.cos_sin.cpu()
        reference.rope_(turned, turned[:, :0], positions, table, widths.interleaved)
        absorbed = torch.cat(
            [torch.einsum("thn,hnc->thc", queries[..., : widths.nope], up[:, : widths.nope]), turned], 2
        )
        # On the case's own device: long prompts take minutes in float64 on a few cores.
        device = self.queries.device
        cache = (self._written().double() * self._wide_scales).unsqueeze(2).to(device)
        attended = reference.attention(
            absorbed.to(device), cache, cache[..., : widths.rank], self._plain, self.shape.scale
        ).cpu()
        return torch.einsum("thc,hvc->thv", attended, up[:, widths.nope :]).flatten(1)

    def distance(self, result: torch.Tensor) -> float:
        """Of the real rows from what is expected, relative."""
        expected = self.expected()
        assert result.shape == (self.queries.shape[0], expected.shape[1])
        return float((result[: self.tokens].cpu().double() - expected).norm() / expected.norm())

    def cache_is_written(self) -> bool:
        """Whether the step's latents are in their slots and nothing else has changed."""
        ours, expected = self.cache.cpu().float(), self._written().float()
        # In fp8 a number between two others may go either way.
        step = 2e-2 if self.scales is None else 2**-3
        return torch.equal(ours.isnan(), expected.isnan()) and torch.allclose(
            ours.nan_to_num(), expected.nan_to_num(), rtol=step, atol=2e-2
        )
