"""Arguments of the Ray Serve application."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from server.settings import ModelSettings


class Options(BaseModel):
    """Arguments of the application."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    config: Path
    """File as ``slimserve serve --config`` takes it, on every node. Its models are served by all replicas."""
    on_demand: list[ModelSettings] = []
    """Models that a replica loads when a request brings one's name in the header ``serve_multiplexed_model_id``. Ray
    sends such requests to a replica that has the model where there is one."""
    allow_remote_without_key: bool = False
    """Serve without keys. Ray's proxy listens for other machines."""
    load_timeout: float = Field(default=1800, gt=0)
    """Seconds for a replica's models to be fetched and loaded."""
