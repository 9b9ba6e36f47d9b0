"""What a replica needs to know."""

from dataclasses import dataclass, field
from typing import Literal

from workflows.serving.limits import Limits


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The models of a replica and how it runs them; see `Run` in `workflows/serve.py`."""

    model: str
    storage: str
    texts: bool
    threads: int
    device: Literal["cpu", "cuda"]
    max_batch: int
    image_cache_mb: int
    text_cache_mb: int
    refresh_seconds: float
    token_digest: str
    limits: Limits = field(default_factory=Limits)
