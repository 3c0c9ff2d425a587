"""Calls of the native CPU library with tensors' addresses.

Functions here take CPU tensors that ``engines.kernels`` has already found to fit (types, contiguous last dimension);
they check nothing. Shapes are those of ``engines.kernels``.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from engines.kernels.native.arguments import PackedCodes, attention_call, quantized_call
from engines.kernels.native.library import TYPE_CODES, VARIANTS, NativeUnavailable, load_library
from engines.kernels.native.tape import Arena, Tape
from engines.kernels.reference import AttentionBatch, row_tables


class Native:
    """The library's kernels for one instruction set."""

    def __init__(self, variants: tuple[str, ...] = VARIANTS) -> None:
        """Takes the first of ``variants`` that this machine has; raises NativeUnavailable."""
        library = load_library()
        found = [(name, table) for name in variants if (table := library.slim_kernels(name.encode()))]
        if not found:
            raise NativeUnavailable(f"the processor has none of the instruction sets {', '.join(variants)}")
        self.variant, self._table = found[0]
        self._library = library
        self._scratch = threading.local()
        self._linear = library.slim_linear
        self._linear_workspace = library.slim_linear_workspace
        self._attention = library.slim_attention
        self._attention_workspace = library.slim_attention_workspace
        self._norm = library.slim_norm
        self._silu_mul = library.slim_silu_mul
        self._rope = library.slim_rope
        self._write_cache = library.slim_write_cache
        self._embed = library.slim_embed
        self._gumbel = library.slim_gumbel
        self._quantized_linear = library.slim_quantized_linear
        self._argmax = library.slim_argmax
        self.panel_width: int = library.slim_panel_width(self._table)

    def _reserve(self, size: int) -> int:
        """Address of ``size`` bytes that this thread may use until its next call, and a tape whenever it runs; fresh
        memory costs page faults."""
        workspace: torch.Tensor | None = getattr(self._scratch, "workspace", None)
        if workspace is None or workspace.numel() < size:
            workspace = self._scratch.workspace = torch.empty(max(size, 1), dtype=torch.uint8)
        if (tape := self._tape) is not None:
            tape.keep(workspace)
        return workspace.data_ptr()

    @property
    def _tape(self) -> Tape | None:
        """On which the calling thread records."""
        return getattr(self._scratch, "tape", None)

    def _threads(self) -> int:
        """Of one call; on a tape the most that it may run on, since a call's memory is laid out for them."""
        tape = self._tape
        return torch.get_num_threads() if tape is None else tape.threads

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tape = self._tape
        return torch.empty(shape, dtype=dtype) if tape is None else tape.arena.empty(shape, dtype)

    @contextmanager
    def recording(self, threads: int, arena: Arena) -> Iterator[Tape]:
        """What this thread calls meanwhile is done, and goes on the tape."""
        self._scratch.tape = tape = Tape(self._library, threads, arena)
        try:
            yield tape
        finally:
            self._scratch.tape = None
            tape.end()

    def pack_panels(self, weight: torch.Tensor) -> torch.Tensor:
        """(out, in) float32 -> (panels, in, panel width), zero past the last column."""
        columns, depth = weight.shape
        panels = weight.new_empty(-(-columns // self.panel_width), depth, self.panel_width)
        self._library.slim_pack_panels(
            self._table, weight.data_ptr(), weight.stride(0), columns, depth, panels.data_ptr(), torch.get_num_threads()
        )
        return panels

    def linear(self, x: torch.Tensor, panels: torch.Tensor, columns: int, bias: torch.Tensor | None) -> torch.Tensor:
        """(T, in) float32 -> (T, columns)."""
        rows, depth = x.shape
        out = self._empty((rows, columns), x.dtype)
        workspace = self._reserve(4 * self._linear_workspace(self._table, rows, depth))
        self._linear(
            self._table,
            x.data_ptr(),
            x.stride(0),
            panels.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            workspace,
            rows,
            depth,
            columns,
            self._threads(),
        )
        return out

    def quantized_linear(
        self,
        x: torch.Tensor,
        weight: PackedCodes,
        norm: tuple[torch.Tensor, float] | None,
        bias: torch.Tensor | None,
        gated: bool,
        residual: torch.Tensor | None,
        out_type: torch.dtype,
    ) -> torch.Tensor:
        """(T, width) -> (T, columns), or half of them where gated, as ``Fusion`` says.

        Norm weight, bias and residual are of x's type; the result's is that or float32. Half of the columns of a
        gated weight are whole panels.
        """
        rows = x.shape[0]
        out = self._empty((rows, weight.columns // 2 if gated else weight.columns), out_type)
        call = quantized_call(x, weight, norm, bias, gated, residual, out, self._threads())
        workspace: torch.Tensor | None = getattr(self._scratch, "workspace", None)
        if workspace is not None:
            call.workspace, call.workspace_bytes = workspace.data_ptr(), workspace.numel()
        address = ctypes.addressof(call)
        while missing := self._quantized_linear(self._table, address):
            call.workspace, call.workspace_bytes = self._reserve(missing), missing
        if self._tape is not None:
            self._reserve(0)
        return out

    def attention(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch, scale: float
    ) -> torch.Tensor:
        """As ``reference.attention``; keys and values may be views of one cache."""
        tokens, query_heads, head_dim = queries.shape
        rows, value_dim, threads = batch.context_lengths.shape[0], values.shape[3], self._threads()
        out = self._empty((tokens, query_heads, value_dim), queries.dtype)
        workspace = self._reserve(self._attention_workspace(self._table, rows, head_dim, value_dim, threads))
        block_tables = row_tables(batch)
        call = attention_call(queries, keys, values, batch, block_tables, scale, out, workspace, threads)
        self._attention(self._table, ctypes.addressof(call))
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x is (T, width) or (T, heads, width)."""
        out = self._empty(x.shape, x.dtype)
        inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
        self._norm(
            self._table,
            x.data_ptr(),
            x.stride(0),
            inner_stride,
            weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            inner,
            x.shape[-1],
            eps,
            TYPE_CODES[x.dtype],
            self._threads(),
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(T, 2I) -> (T, I)."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = self._empty((rows, width), gate_up.dtype)
        self._silu_mul(
            self._table,
            gate_up.data_ptr(),
            gate_up.stride(0),
            out.data_ptr(),
            rows,
            width,
            TYPE_CODES[gate_up.dtype],
            self._threads(),
        )
        return out

    def rope_(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        interleaved: bool,
    ) -> None:
        """In place, both of one type."""
        self._rope(
            self._table,
            queries.data_ptr(),
            queries.stride(0),
            queries.stride(1),
            queries.shape[1],
            keys.data_ptr(),
            keys.stride(0),
            keys.stride(1),
            keys.shape[1],
            positions.data_ptr(),
            cos_sin.data_ptr(),
            queries.shape[0],
            cos_sin.shape[1],
            interleaved,
            TYPE_CODES[queries.dtype],
            self._threads(),
        )

    def write_cache(self, entries: torch.Tensor, cache: torch.Tensor, cache_slots: torch.Tensor) -> None:
        """(T, heads, width) or (T, width) entries into a contiguous (blocks, block_size, ...) cache."""
        heads, head_stride = (entries.shape[1], entries.stride(1)) if entries.dim() == 3 else (1, 0)
        self._write_cache(
            self._table,
            entries.data_ptr(),
            entries.stride(0),
            head_stride,
            cache.data_ptr(),
            cache_slots.data_ptr(),
            entries.shape[0],
            heads,
            entries.shape[-1],
            TYPE_CODES[entries.dtype],
            TYPE_CODES[cache.dtype],
            self._threads(),
        )

    def embed(
        self, ids: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero_point: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """(T,) int64 ids, (V, D) uint8 codes and (V, groups) float32 scales, all contiguous -> (T, D)."""
        tokens, (lines, width) = ids.shape[0], codes.shape
        out = self._empty((tokens, width), dtype)
        self._embed(
            self._table,
            codes.data_ptr(),
            scale.data_ptr(),
            ids.data_ptr(),
            out.data_ptr(),
            lines,
            tokens,
            width,
            scale.shape[1],
            zero_point,
            TYPE_CODES[dtype],
            self._threads(),
        )
        return out

    def argmax(self, values: torch.Tensor) -> torch.Tensor:
        """(R, V) float32 -> (R,) int64: the first place of each row's largest value; some place if it has none."""
        out = torch.empty(values.shape[0], dtype=torch.int64)
        rows, width = values.shape
        threads = self._threads()
        self._argmax(self._table, values.data_ptr(), values.stride(0), out.data_ptr(), rows, width, threads)
        return out

    def gumbel_noise(
        self, seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, vocab: int
    ) -> torch.Tensor:
        """Contiguous int64 (R,) -> (R, vocab) float32."""
        out = torch.empty(seeds.shape[0], vocab)
        self._gumbel(
            self._table,
            seeds.data_ptr(),
            choices.data_ptr(),
            positions.data_ptr(),
            out.data_ptr(),
            seeds.shape[0],
            vocab,
            self._threads(),
        )
        return out
