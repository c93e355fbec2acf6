"""Runs Gluon kernels without a GPU and without Triton: their own source, with another `gl`.

What it imitates: the three roles of a program as threads, mbarriers with their phases, copies that arrive late, matrix
products that are done when they are waited for. What a kernel must not do fails: a load or store outside of its tensor
(IndexError), a role that waits for ever (Deadlock), reading shared memory before its copy has arrived or after the
buffer was given back (its values are NaN by then), a product used before it was waited for, an entry of a tensor that
two roles or programs write (RuntimeError).

What it does not imitate: layouts, registers, proxies and their fences, the order of memory between threads of one role,
rounding in a product; nor what a compiler makes of the source (Triton 3.6 drops `a = b` in a loop before which both
named the same tensor).
Programs run one after another, not side by side.
"""

from __future__ import annotations

import builtins
import importlib.util
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

PATIENCE = 60.0  # seconds that a role may wait
SLOW = 0.0  # seconds that a product, a copy or an arrival takes
LATE = 0.0  # seconds that a copy takes besides
THREADS = 128  # of a role


class Deadlock(RuntimeError):
    """A role waited for something that never came."""


class Scalar(int):
    """An integer of a kernel: ``.to``, and division that truncates, as on the device."""

    def to(self, _: object) -> Scalar:
        return self


def _operator(name: str) -> Callable[[Scalar, Any], Any]:
    plain = getattr(int, name)

    def call(self: Scalar, other: Any) -> Any:
        found = plain(self, other)
        return Scalar(found) if type(found) is int else found

    return call


for _name in ("add", "sub", "mul", "and", "or", "xor", "lshift", "rshift"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Scalar, _form, _operator(_form))


def _truncated(self: Scalar, other: Any) -> Any:
    if not isinstance(other, int):
        return NotImplemented
    found = abs(int(self)) // abs(int(other))
    return Scalar(found if (self < 0) == (other < 0) else -found)


Scalar.__floordiv__ = _truncated  # type: ignore[method-assign, assignment]
Scalar.__mod__ = lambda a, b: Scalar(int(a) - int(b) * int(_truncated(a, b)))  # type: ignore[method-assign, assignment]
Scalar.__rfloordiv__ = lambda a, b: _truncated(Scalar(b), a)  # type: ignore[method-assign, assignment]
Scalar.__rmod__ = lambda a, b: Scalar(b) % a  # type: ignore[method-assign, assignment]
Scalar.__neg__ = lambda a: Scalar(-int(a))  # type: ignore[method-assign, assignment]


def scalars(*bounds: int) -> Iterator[Scalar]:
    """`range` of a kernel."""
    return map(Scalar, builtins.range(*bounds))


class Tile(torch.Tensor):
    """A tensor of a kernel: ``.type.layout`` is there, and means nothing."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=None)

    def to(self, *given: Any, bitcast: bool = False, **more: Any) -> Any:
        """As of a tensor; ``bitcast``: the same bits as another type, where a NaN has no sign, as a GPU makes them."""
        if bitcast:
            return self.masked_fill(self.isnan(), torch.nan).abs().where(self.isnan(), self).contiguous().view(*given)
        return super().to(*given, **more)


def tile(x: torch.Tensor) -> Any:
    """A `Tile`, or a number where there are no dimensions."""
    if x.dim():
        return x.as_subclass(Tile)
    return float(x) if x.is_floating_point() else Scalar(int(x))


class Pointer:
    """An address, or a tensor of them: places in the storage of a tensor."""

    def __init__(self, storage: torch.Tensor, place: Any = 0) -> None:
        self.storage, self.place = storage, place

    @classmethod
    def to(cls, x: torch.Tensor) -> Pointer:
        size = x.untyped_storage().nbytes() // x.element_size()
        return cls(torch.as_strided(x, (size,), (1,), 0), Scalar(x.storage_offset()))

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.storage.dtype)

    def __add__(self, more: Any) -> Pointer:
        more = more.long() if isinstance(more, torch.Tensor) else more
        return Pointer(self.storage, self.place + more)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(places, which of them are used), of one shape; raises IndexError for a used one outside."""
        place = torch.as_tensor(self.place).as_subclass(torch.Tensor).long()
        used = torch.as_tensor(True if mask is None else mask).as_subclass(torch.Tensor).bool()
        place, used = torch.broadcast_tensors(place, used)
        wrong = used & ((place < 0) | (place >= self.storage.numel()))
        if bool(wrong.any()):
            raise IndexError(f"address {int(place[wrong][0])} of a tensor of {self.storage.numel()}")
        return place, used


class Shared:
    """A tensor in shared memory, or a part of one."""

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    def index(self, at: int) -> Shared:
        return Shared(self.held[int(at)])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.held.permute(tuple(order)))

    def store(self, value: torch.Tensor) -> None:
        self.held.copy_(value)

    def load(self, layout: Any) -> Any:
        return tile(self.held.clone())


class Barrier:
    """An mbarrier: completed phases, and arrivals in the current one."""

    def __init__(self) -> None:
        self.count = self.arrived = self.completed = 0
        self.changed = threading.Condition()

    def arrive(self, count: int) -> None:
        with self.changed:
            self.arrived += count
            if self.arrived > self.count:
                raise RuntimeError(f"{self.arrived} arrivals at a barrier of {self.count}")
            if self.arrived == self.count:
                self.arrived, self.completed = 0, self.completed + 1
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        """Until the phase of this parity is over."""
        end = time.monotonic() + PATIENCE
        with self.changed:
            while self.completed & 1 == int(phase) & 1:
                if _role().program.failed or time.monotonic() > end:
                    raise Deadlock("a role waits for a barrier that nobody completes")
                self.changed.wait(0.05)


class Barriers:
    """mbarriers in shared memory."""

    def __init__(self, count: int) -> None:
        self.held = [Barrier() for _ in range(count)]

    def index(self, at: int) -> Barrier:
        return self.held[int(at)]


class Product:
    """A matrix product on its way: its operands must be the same when it is waited for as when it was asked for."""

    def __init__(self, a: Any, b: Shared, more: Any) -> None:
        self.a, self.b, self.more, self.value = a, b, more, None
        self.before = b.held.clone()

    def done(self) -> Tile:
        if self.value is None:
            if not torch.equal(self.before.nan_to_num(3.0), self.b.held.nan_to_num(3.0)):
                raise RuntimeError("a buffer was filled anew under a product on its way")
            left = self.a.held if isinstance(self.a, Shared) else self.a
            found = left.as_subclass(torch.Tensor).float() @ self.b.held.float()
            more = self.more.done() if isinstance(self.more, Product) else self.more
            self.value = found.as_subclass(Tile) if more is None else found.as_subclass(Tile) + more
        return self.value


class Program:
    """One program of a grid."""

    def __init__(self, place: Sequence[int], grid: Sequence[int]) -> None:
        self.place, self.grid, self.failed = place, grid, False


class Role(threading.local):
    """What a thread of the emulation is just now."""

    program: Program
    copies: list[Callable[[], None]]
    products: list[Product]


_CURRENT = Role()


def _role() -> Role:
    return _CURRENT


def _begin(program: Program) -> None:
    _CURRENT.program, _CURRENT.copies, _CURRENT.products = program, [], []


def _arrived() -> None:
    for copy in _CURRENT.copies:
        copy()
    _CURRENT.copies = []


def _copy(smem: Shared, source: Pointer) -> None:
    place, _ = source.places(None)
    smem.held.fill_(torch.nan)
    _CURRENT.copies.append(lambda: smem.held.copy_(source.storage[place]))


def _product(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    made = Product(a, b, acc if use_acc else None)
    if not is_async:
        return made.done()
    _CURRENT.products.append(made)
    return made


def _product_wait(left: int, deps: Sequence[Product]) -> Any:
    time.sleep(SLOW)  # the others go on meanwhile, with all that they have been given
    over = _CURRENT.products[: len(_CURRENT.products) - left]
    _CURRENT.products = _CURRENT.products[len(over) :]
    for product in over:
        product.done()
    if any(isinstance(dep, Product) and dep.value is None for dep in deps):
        raise RuntimeError("a product is used before it was waited for")
    found = tuple(dep.value if isinstance(dep, Product) else dep for dep in deps)
    return found[0] if len(found) == 1 else found


def _load(source: Pointer, mask: Any = None, other: Any = 0) -> Any:
    place, used = source.places(mask)
    found = torch.where(used, source.storage[place.where(used, torch.zeros_like(place))], other)
    return tile(found.to(source.storage.dtype))


WRITERS: dict[int, torch.Tensor] = {}
"""Of each tensor that the launch has written to: which role of which program wrote an entry."""


def _claim(storage: torch.Tensor, places: torch.Tensor) -> None:
    """Remember who writes; raises RuntimeError for an entry that another role or program has written."""
    who = hash((_CURRENT.program.place, threading.get_ident())) & (2**62 - 1)
    with _LOCK:
        writers = WRITERS.setdefault(storage.data_ptr(), torch.full((storage.numel(),), -1, dtype=torch.int64))
        before = writers[places]
        if bool(((before != -1) & (before != who)).any()):
            raise RuntimeError("two roles or programs write the same entry")
        writers[places] = who


_LOCK = threading.Lock()


def _store(target: Pointer, value: Any, mask: Any = None) -> None:
    place, used = target.places(mask)
    _claim(target.storage, place[used])
    value = torch.as_tensor(value).as_subclass(torch.Tensor).to(target.storage.dtype)
    place, used, value = torch.broadcast_tensors(place, used, value)
    target.storage[place[used]] = value[used]


def _atomic_add(target: Pointer, value: int, sem: str = "acq_rel") -> Scalar:
    place, _ = target.places(None)
    before = Scalar(int(target.storage[place]))
    target.storage[place] += int(value)
    return before


def _where(which: Any, a: Any, b: Any) -> Any:
    if isinstance(which, (bool, int)):
        which = torch.tensor(bool(which))
    like = next((x for x in (a, b) if isinstance(x, torch.Tensor)), None)
    if like is None and all(isinstance(x, int) for x in (a, b)):
        return tile(
            torch.where(which, torch.tensor(int(a), dtype=torch.int32), torch.tensor(int(b), dtype=torch.int32))
        )
    found = torch.where(which, a, b)
    return tile(found if like is None else found.to(like.dtype))


def _extreme(least: bool) -> Callable[[Any, Any], Any]:
    def call(a: Any, b: Any) -> Any:
        if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
            found = min(a, b) if least else max(a, b)
            return Scalar(found) if isinstance(found, int) else found
        like = a if isinstance(a, torch.Tensor) else b
        a, b = (torch.as_tensor(x, dtype=like.dtype) for x in (a, b))
        if like.is_floating_point():
            return tile((torch.fmin if least else torch.fmax)(a, b))
        return tile((torch.minimum if least else torch.maximum)(a, b))

    return call


def _most(x: torch.Tensor, axis: int) -> Any:
    return tile(x.masked_fill(x.isnan(), -torch.inf).amax(axis))


def _sum(x: torch.Tensor, axis: int) -> Any:
    return tile(x.sum(axis).to(x.dtype))


def _fold(x: torch.Tensor, axis: int, call: Callable[[Any, Any], Any]) -> list[torch.Tensor]:
    return list(itertools.accumulate(x.unbind(axis), call))


def _reduce(given: Any, axis: int, call: Callable[..., Any]) -> Any:
    parts = [x.unbind(axis) for x in given]
    total = tuple(column[0] for column in parts)
    for row in list(zip(*parts, strict=True))[1:]:
        total = call(*total, *row)
    return tuple(tile(torch.as_tensor(x)) for x in total)


def _specialize(roles: Sequence[tuple[Callable[..., None], Sequence[Any]]], *_: object) -> None:
    """All roles at once, each a thread; the first error that is no deadlock is raised."""
    program, errors = _CURRENT.program, []

    def run(call: Callable[..., None], given: Sequence[Any]) -> None:
        _begin(program)
        try:
            with torch.no_grad():
                call(*given)
        except BaseException as error:
            program.failed = True
            errors.append(error)

    threads = [threading.Thread(target=run, args=role, daemon=True) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, Deadlock)), errors[0])


class _Layout:
    """Any layout."""

    def __init__(self, *_: object) -> None:
        pass

    @staticmethod
    def get_default_for(*_: object) -> _Layout:
        return _Layout()


class _BarrierLayout(_Layout):
    pass


def _shared(dtype: torch.dtype, shape: Sequence[int], layout: _Layout) -> Any:
    if isinstance(layout, _BarrierLayout):
        return Barriers(int(shape[0]))
    poison = torch.nan if dtype.is_floating_point else 0x5A5A5A5A
    return Shared(torch.full([int(n) for n in shape], poison, dtype=dtype))


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = int(count)


def _language() -> ModuleType:
    gl = ModuleType("gl")
    gl.__dict__.update(
        constexpr=lambda x: Scalar(x) if type(x) is int else x, static_range=scalars, float32=torch.float32,
        int32=torch.int32, int64=torch.int64, BlockedLayout=_Layout, SliceLayout=_Layout, DotOperandLayout=_Layout,
        DistributedLinearLayout=_Layout,
        NVMMADistributedLayout=_Layout, NVMMASharedLayout=_Layout, SwizzledSharedLayout=_Layout,
        atomic_add=_atomic_add, allocate_shared_memory=_shared,
        barrier=lambda: None, warp_specialize=_specialize, load=_load, store=_store, where=_where,
        minimum=_extreme(True), maximum=_extreme(False), max=_most, sum=_sum, reduce=_reduce,
        program_id=lambda axis: Scalar(_CURRENT.program.place[axis]),
        num_programs=lambda axis: Scalar(_CURRENT.program.grid[axis]),
        arange=lambda low, high, _=None: tile(torch.arange(int(low), int(high), dtype=torch.int32)),
        zeros=lambda shape, dtype, _=None: tile(torch.zeros([int(n) for n in shape], dtype=dtype)),
        full=lambda shape, value, dtype, _=None: tile(torch.full([int(n) for n in shape], value, dtype=dtype)),
        zeros_like=lambda x: tile(torch.zeros_like(x)), convert_layout=lambda x, _=None, assert_trivial=False: x,
        reshape=lambda x, shape: x.reshape([int(n) for n in shape]), permute=lambda x, order: x.permute(order),
        split=lambda x: (x[..., 0], x[..., 1]), join=lambda a, b: tile(torch.stack(torch.broadcast_tensors(a, b), -1)),
        abs=torch.abs, exp2=torch.exp2, log2=torch.log2,
        reduce_or=lambda x, axis: tile(_fold(x, axis, lambda a, b: a | b)[-1]),
        associative_scan=lambda x, axis, call: tile(torch.stack(_fold(x, axis, call), axis)),
    )  # fmt: skip
    return gl


def load(path: Path) -> ModuleType:
    """The module in this file, its kernels ready to be launched here."""
    gl = _language()
    gluon = ModuleType("gluon")
    gluon.__dict__.update(jit=lambda call: call, language=gl)
    mbarrier = SimpleNamespace(
        init=_init, wait=lambda barrier, phase, pred=True: barrier.wait(phase) if pred else None,
        arrive=lambda barrier, pred=True: (barrier.arrive(1), time.sleep(SLOW)) if pred else None,
        MBarrierLayout=_BarrierLayout,
    )  # fmt: skip
    copies = SimpleNamespace(
        async_copy_global_to_shared=_copy, commit_group=lambda: None, wait_group=lambda left: _arrived(),
        mbarrier_arrive=lambda barrier, increment_count: (time.sleep(SLOW + LATE), _arrived(), barrier.arrive(THREADS)),
    )  # fmt: skip
    hopper = {
        "fence_async_shared": lambda: None, "mbarrier": mbarrier, "warpgroup_mma": _product,
        "warpgroup_mma_wait": _product_wait,
    }  # fmt: skip
    fakes = {"triton": {}, "triton.experimental": {"gluon": gluon}, "triton.experimental.gluon": {"language": gl},
             "triton.experimental.gluon.language": gl.__dict__, "triton.experimental.gluon.language.nvidia": {},
             "triton.experimental.gluon.language.nvidia.ampere": {"async_copy": copies},
             "triton.experimental.gluon.language.nvidia.hopper": hopper}  # fmt: skip
    before = {name: sys.modules.get(name) for name in fakes}
    for name, held in fakes.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update({k: v for k, v in held.items() if not k.startswith("__")})
    try:
        spec = importlib.util.spec_from_file_location(f"emulated_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    module.__dict__["range"] = scalars
    return module


class Kernel:
    """A kernel that is launched as Triton's are: ``kernel[grid](*arguments, **constants)``."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        whole = tuple(grid) + (1,) * (3 - len(grid))

        def launch(*given: Any, num_warps: int = 4, maxnreg: int | None = None, **constants: Any) -> None:
            arguments = [_argument(x) for x in given]
            WRITERS.clear()
            for place in itertools.product(*(range(n) for n in reversed(whole))):
                _begin(Program(place[::-1], whole))
                self.call(*arguments, **{name: _argument(x) for name, x in constants.items()})

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer.to(x)
    return Scalar(x) if type(x) is int else x
