"""Values that many tasks read: in Ray's object store, or themselves where everything runs inside the driver."""

from typing import TypeAlias, TypeVar

import ray

T = TypeVar("T")
Shared: TypeAlias = ray.ObjectRef[T] | T


def share(value: T) -> Shared[T]:
    """Put a value where all tasks find it."""
    return ray.put(value) if ray.is_initialized() else value


def shared(value: Shared[T]) -> T:
    """What was shared."""
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value
