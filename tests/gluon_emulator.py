"""Runs kernels written in Gluon on the CPU, for their logic: indices, masks, barriers and their phases.

Triton's interpreter does not know Gluon. Here a kernel's source is executed with NumPy in the place of the language;
the partitions of a program are threads, shared memory begins as NaN, and what waits for ever raises. Layouts, and what
a product that is still running may not touch, are not emulated.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

PATIENCE = 20.0
"""Seconds that a barrier is waited for."""


class Values(np.ndarray[Any, Any]):
    """A tensor, or a number, in registers."""

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Values:
        return _values(array)

    def to(self, dtype: Any) -> Values:
        return self if dtype is None else self.astype(dtype).view(Values)

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)

    def permute(self, order: tuple[int, ...]) -> Values:
        return self.transpose(order)

    def split(self) -> tuple[Values, Values]:
        return _values(self[..., 0]), _values(self[..., 1])


def _values(array: Any) -> Values:
    return np.asarray(array).view(Values)


class Pointer:
    """Into a flat array; numbers are kept as they are, whatever type is asked for."""

    dtype = SimpleNamespace(element_ty=None)

    def __init__(self, array: Any, offset: Any = 0) -> None:
        self.array, self.offset = np.asarray(array).reshape(-1), np.asarray(offset)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + np.asarray(offset))


class Shared:
    """A part of shared memory, or barriers in it."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def index(self, index: Any) -> Shared:
        return Shared(self.array[int(index)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.array.transpose(order))

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        return Shared(self.array.reshape(shape))

    def store(self, values: Any) -> None:
        self.array[...] = values

    def load(self, layout: Any) -> Values:
        return _values(self.array.copy())


class Barrier:
    """Flips its phase when all have arrived and all bytes that were announced are there."""

    def __init__(self) -> None:
        self.changed, self.phase, self.count, self.missing, self.bytes = threading.Condition(), 0, 0, 0, 0

    def update(self, arrivals: int = 0, expected: int = 0) -> None:
        with self.changed:
            self.missing, self.bytes = self.missing - arrivals, self.bytes + expected
            assert self.missing >= 0, "more arrive than the barrier was made for"
            if not self.missing and not self.bytes:
                self.phase, self.missing = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != phase, PATIENCE), "waits for ever"


def _init(shared: Shared, count: int) -> None:
    shared.array[0].count = shared.array[0].missing = count


def _expect(shared: Shared, expected: int, pred: Any = True) -> None:
    if pred:
        shared.array[0].update(1, expected)


MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: Barrier,
    init=_init,
    expect=_expect,
    arrive=lambda shared, count, pred=True: shared.array[0].update(count) if pred else None,
    wait=lambda shared, phase, pred=True: shared.array[0].wait(int(phase)) if pred else None,
)


def _copy(matrix: Any, place: Any, barrier: Shared, target: Shared, pred: Any = True) -> None:
    """Of 16-bit numbers: two bytes each. Outside the matrix are zeros."""
    if pred:
        (row, column), (rows, columns) = map(int, place), target.array.shape
        inside = matrix[row : row + rows, column : column + columns]
        target.array[...] = 0
        target.array[: inside.shape[0], : inside.shape[1]] = inside
        barrier.array[0].update(0, -2 * rows * columns)


class Copies(threading.local):
    """Loads into shared memory that a partition has begun: they are there when it has waited for them."""

    def __init__(self) -> None:
        self.begun: list[tuple[Shared, Pointer]] = []

    def begin(self, target: Shared, source: Pointer) -> None:
        self.begun.append((target, source))

    def wait(self, running: int) -> None:
        assert running == 0
        for target, source in self.begun:
            target.store(_load(source))
        self.begun.clear()


class Stores(threading.local):
    """Copies out of shared memory that a partition has begun: they read it when the partition waits for them."""

    def __init__(self) -> None:
        self.begun: list[tuple[Any, int, int, Shared]] = []

    def begin(self, matrix: Any, place: Any, source: Shared) -> None:
        row, column = map(int, place)
        self.begun.append((matrix, row, column, source))

    def wait(self, running: int) -> None:
        assert running == 0
        for matrix, row, column, source in self.begun:
            inside = matrix[row : row + source.array.shape[0], column : column + source.array.shape[1]]
            inside[...] = source.array[: inside.shape[0], : inside.shape[1]]
        self.begun.clear()


ASSEMBLY: dict[str, Callable[[Any], Any]] = {
    "ex2.approx.ftz.f32 $0, $1;": np.exp2,
    "rcp.approx.ftz.f32 $0, $1;": lambda x: 1 / x,
}
"""What is known of it that computes something."""


def _assembly(text: str, constraints: str, operands: list[Any], **_: Any) -> Any:
    return _values(ASSEMBLY[text](operands[0])) if operands else None


def _multiply(left: Any, right: Shared, sums: Any, use_acc: bool = True, is_async: bool = False) -> Values:
    operand = left.array if isinstance(left, Shared) else np.asarray(left)
    return _values((np.asarray(sums) if use_acc else 0) + operand @ right.array)


def _multiply_registers(left: Any, right: Any, sums: Any) -> Values:
    return _values(np.asarray(sums) + np.asarray(left) @ np.asarray(right))


def _load(pointer: Pointer, mask: Any = True, other: Any = 0, cache_modifier: str = "") -> Values:
    present = np.broadcast_to(np.asarray(mask), pointer.offset.shape)
    return _values(np.where(present, pointer.array[np.where(present, pointer.offset, 0)], other))


def _store(pointer: Pointer, values: Any, mask: Any = True) -> None:
    present = np.broadcast_to(np.asarray(mask), pointer.offset.shape)
    pointer.array[pointer.offset[present]] = np.broadcast_to(np.asarray(values), pointer.offset.shape)[present]


def _atomic_add(pointer: Pointer, values: Any, mask: Any = True, sem: str = "", scope: str = "gpu") -> Values:
    """Elsewhere than where it adds there is anything."""
    shape = pointer.offset.shape
    present, added = np.broadcast_to(np.asarray(mask), shape), np.broadcast_to(np.asarray(values), shape)
    found = np.where(present, pointer.array[np.where(present, pointer.offset, 0)], np.iinfo(np.int32).max)
    np.add.at(pointer.array, pointer.offset[present], added[present])
    return _values(found)


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    if layout is Barrier:
        return Shared(np.array([[Barrier()] for _ in range(shape[0])], object))
    if dtype is np.int32:
        return Shared(np.full(shape, np.iinfo(dtype).min))
    return Shared(np.full(shape, np.nan, np.float32))


def _specialize(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    errors: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            with np.errstate(all="ignore"):  # which a thread does not inherit
                function(*arguments)
        except Exception as error:  # noqa: BLE001 - raised again where the program was started
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _language(program: int, programs: int) -> SimpleNamespace:
    registers = ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout")
    layouts = (*registers, "NVMMASharedLayout", "SwizzledSharedLayout")
    return SimpleNamespace(
        **dict.fromkeys(layouts, lambda *_: None),
        int32=np.int32,
        int64=np.int64,
        float32=np.float32,
        program_id=lambda axis: _values(program),
        num_programs=lambda axis: _values(programs),
        inline_asm_elementwise=_assembly,
        arange=lambda start, end, layout: _values(np.arange(start, end)),
        zeros=lambda shape, dtype, layout: _values(np.zeros(shape, np.float32)),
        full=lambda shape, value, dtype, layout: _values(np.full(shape, value, dtype)),
        load=_load,
        store=_store,
        atomic_add=_atomic_add,
        where=lambda *parts: _values(np.where(*parts)),
        join=lambda left, right: _values(np.stack([left, right], -1)),
        minimum=lambda left, right: _values(np.minimum(left, right)),
        maximum=lambda left, right: _values(np.maximum(left, right)),
        exp2=lambda x: _values(np.exp2(x)),
        log2=lambda x: _values(np.log2(x)),
        rsqrt=lambda x: _values(1 / np.sqrt(x)),
        sum=lambda x, axis: _values(np.sum(np.asarray(x), axis)),
        max=lambda x, axis: _values(np.max(np.asarray(x), axis)),
        associative_scan=lambda x, axis, function: _values(np.cumsum(np.asarray(x), axis)),
        static_range=range,
        thread_barrier=lambda: None,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        allocate_shared_memory=_allocate,
        warp_specialize=_specialize,
    )


def _kernels(module: ModuleType) -> str:
    """The source of the module's device functions."""
    source = inspect.getsource(module)
    begin, end = source.index("@gluon.jit"), source.find(" = Launcher(")
    return source[begin:] if end < 0 else source[begin : source.rindex("\n", begin, end)]


def run(module: ModuleType, kernel: str, programs: int, *arguments: Any, needs: tuple[ModuleType, ...] = ()) -> None:
    """Run that kernel of the module as a grid of so many programs, one after the other.

    ``needs`` are modules from which it takes device functions.
    """
    source = "\n\n".join(_kernels(one) for one in (*needs, module))
    code = compile("from __future__ import annotations\n" + source, kernel, "exec")
    for program in range(programs):
        copies, stores = Copies(), Stores()
        names: dict[str, Any] = {
            "gluon": SimpleNamespace(jit=lambda function=None, **_: function or (lambda inner: inner)),
            "gl": _language(program, programs),
            "mbarrier": MBARRIER,
            "tma": SimpleNamespace(
                async_copy_global_to_shared=_copy, async_copy_shared_to_global=stores.begin, store_wait=stores.wait
            ),
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=copies.begin, commit_group=lambda: None, wait_group=copies.wait
            ),
            "fence_async_shared": lambda: None,
            "mma_v2": _multiply_registers,
            "warpgroup_mma": _multiply,
            "warpgroup_mma_wait": lambda running, deps: deps[0] if len(deps) == 1 else deps,
        }
        exec(code, names)  # the project's own source
        with np.errstate(all="ignore"):
            names[kernel](*arguments)
