"""Values that many tasks read: in Ray's object store, or as they are if everything runs inside the driver."""

from typing import TypeAlias, TypeVar

import ray

T = TypeVar("T")
SharedValue: TypeAlias = ray.ObjectRef[T] | T


def put_shared(value: T) -> SharedValue[T]:
    """Put a value into the object store, if Ray runs."""
    return ray.put(value) if ray.is_initialized() else value


def get_shared(value: SharedValue[T]) -> T:
    """The value that was put."""
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value
