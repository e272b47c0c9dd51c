"""How functions become kernels: what Numba is asked for, and the cache of what it made.

A kernel that Python calls is a `job`; `compiled` is for those that only kernels call. They get no entry for Python, and
one version for all values of a number: half of the time of a first start went into such entries and versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator
from numba.core.ccallback import CFunc
from numba.core.registry import CPUDispatcher

from tenora_kernels.cpu.runtime import cache
from tenora_kernels.cpu.runtime.levels import LEVELS, best_level

__all__ = ["callback", "compiled", "job"]


def compiled(**options: Any) -> Callable[[Any], Any]:
    """A function for other kernels: nopython, without the interpreter's lock, kept on disk.

    Args:
        options: of `numba.njit`.
    """
    return _decorator(Kernel, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


def job(**options: Any) -> Callable[[Any], Any]:
    """The same for a function that Python calls."""
    return _decorator(Job, no_cfunc_wrapper=True, **options)


def callback(function: Callable[..., None], signature: Any) -> Any:
    """The same for a function that is called through its address, compiled at once."""
    made = _Callback(function, (signature.args, signature.return_type), locals={}, options={"nopython": True})
    made.enable_caching()
    made.compile()
    return made


def _decorator(kind: type[CPUDispatcher], **options: Any) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        kernel = kind(py_func=function, locals={}, targetoptions={"nopython": True, "nogil": True, **options})
        kernel.enable_caching()
        return kernel

    return decorate


class Job(CPUDispatcher):  # type: ignore[misc]  # numba has no types
    """A compiled function."""

    def enable_caching(self) -> None:
        """Keep what is compiled."""
        self._cache = KernelCache(self.py_func)

    def holds(self, signature: Any) -> bool:
        """Whether the cache has the version for arguments of these types."""
        return isinstance(self._cache, KernelCache) and self._cache.holds(signature, self.targetctx)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """For a call from another kernel: the same version whatever number a constant argument is."""
        return super().get_call_template(tuple(_any_value(kind) for kind in args), kws)


class Kernel(Job):
    """A compiled function that has no entry for Python."""

    def __call__(self, *_args: Any, **_kws: Any) -> Any:
        """Refuse."""
        raise TypeError(f"{self.py_func.__name__} can be called by other kernels only; make it a job to call it here.")


def _any_value(kind: Any) -> Any:
    if isinstance(kind, (types.IntegerLiteral, types.BooleanLiteral)):
        kind = types.unliteral(kind)
    return types.int64 if isinstance(kind, types.Integer) and kind.signed else kind


class _Callback(CFunc):
    def enable_caching(self) -> None:
        """Keep what is compiled."""
        self._cache = KernelCache(self._pyfunc)  # type: ignore[attr-defined]  # numba's stub lacks it


class _Directory(_CacheLocator):  # type: ignore[misc]  # numba has no types
    """`cache.writable`, for Numba; where there is none, what came with the code is still read."""

    def __init__(self, py_func: Any) -> None:
        self._line = py_func.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(cache.writable() or cache.shipped())

    def get_source_stamp(self) -> str:
        return cache.source_digest()

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, py_func: Any, py_file: Any) -> _Directory:  # noqa: ARG003  # numba's signature
        return cls(py_func)


class _Implementation(CompileResultCacheImpl):  # type: ignore[misc]  # numba has no types
    _locator_classes = (_Directory,)


class KernelCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Numba's cache of a function in our directories. Its key holds the processor's name and features.

    What came with the code may be for the processor's level instead of the processor itself.
    """

    _impl_class = _Implementation

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        self._shipped = IndexDataCacheFile(
            cache_path=str(cache.shipped()), filename_base=self._impl.filename_base, source_stamp=cache.source_digest()
        )

    def holds(self, sig: Any, target_context: Any) -> bool:
        """Whether a version is on disk."""
        target_context.refresh()
        places = self._places(sig, target_context)
        return any(key in file._load_index() for file, key in places)  # noqa: SLF001  # reads no code, as `load` does

    def _load_overload(self, sig: Any, target_context: Any) -> Any:
        for file, key in self._places(sig, target_context):
            if (data := file.load(key)) is not None:
                return self._impl.rebuild(target_context, data)
        return None

    def _places(self, sig: Any, target_context: Any) -> Iterator[tuple[IndexDataCacheFile, Any]]:
        """Files in which the version may be, with its key there."""
        key = self._index_key(sig, target_context.codegen())
        yield self._cache_file, key
        yield self._shipped, key
        if (level := best_level()) is not None:
            _, (triple, *_), code = key
            yield self._shipped, (sig, (triple, level, LEVELS[level]), code)

    def _save_overload(self, sig: Any, data: Any) -> None:
        if cache.writable() is not None:
            with cache.exclusive():
                super()._save_overload(sig, data)
