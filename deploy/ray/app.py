"""A Ray Serve application: each replica is a Slimserve server with its own worker, behind Ray's proxy.

    serve run deploy.ray.app:build config=slimserve.yaml

Ray's own options (CPUs and GPUs of a replica, autoscaling) are set in Serve's configuration file: ``rayservice.yaml``.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import Response

from deploy.ray.child import Child
from deploy.ray.forward import forward, refusal
from deploy.ray.options import Options
from server.errors import ModelNotFound, SlimserveError, UsageError

MODELS_PER_REPLICA = 2
"""On-demand models that one replica holds; the one that was asked for longest ago makes room."""


class OnDemandModel:
    """One that a replica holds. Ray calls ``__del__`` when it makes room: the next reload leaves the model out."""

    def __init__(self, name: str, loaded: dict[str, OnDemandModel]) -> None:
        self._name = name
        self._loaded = loaded
        loaded[name] = self

    def __del__(self) -> None:
        # Called again by Python: by then the name may be another object's.
        if self._loaded.get(self._name) is self:
            del self._loaded[self._name]


class Replica:
    """Its server queues and refuses by itself, so ``max_ongoing_requests`` is far above what runs."""

    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        """Until the models are loaded. Raises UsageError and EngineUnavailable."""
        self._options = Options.model_validate(options)
        self._on_demand = {model.served_name: model for model in self._options.on_demand}
        self._loaded: dict[str, OnDemandModel] = {}
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._child = Child(self._options.config)
        if not self._child.locked and not self._options.allow_remote_without_key:
            raise UsageError("no key is set: set SLIMSERVE_API_KEY on the nodes, or allow_remote_without_key")
        try:
            await self._child.start(self._options.load_timeout)
        except BaseException:
            await self._child.stop()
            raise

    async def __call__(self, request: Request) -> Response:
        name = serve.get_multiplexed_model_id()
        if name:
            try:
                await self._on_demand_model(name)
            except SlimserveError as error:
                return refusal(error)
        return await forward(request, self._child.http, self._replica)

    async def _on_demand_model(self, name: str) -> None:
        # Only what the operator listed: Ray would keep a place for any name.
        if name not in self._on_demand:
            raise ModelNotFound(f"The model {name[:100]!r} is not served on demand.", param="model")
        await self._load(name)

    @serve.multiplexed(max_num_models_per_replica=MODELS_PER_REPLICA)  # type: ignore[untyped-decorator]
    async def _load(self, name: str) -> OnDemandModel:
        model = OnDemandModel(name, self._loaded)
        wanted = [self._on_demand[each] for each in [*self._loaded]]
        try:
            await self._child.serve_also(wanted, self._options.load_timeout)
        except BaseException:
            model.__del__()
            raise
        return model

    async def check_health(self) -> None:
        """Ray starts another replica when this raises."""
        await self._child.check()

    async def __del__(self) -> None:
        if hasattr(self, "_child"):
            await self._child.stop()


Slimserve = serve.deployment(
    name="Slimserve",
    max_ongoing_requests=256,
    health_check_period_s=5,
    health_check_timeout_s=15,
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 1},
    autoscaling_config={
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 16,
        "upscale_delay_s": 30,
        "downscale_delay_s": 600,
    },
)(Replica)
"""These are defaults; a configuration file says otherwise by deployment name."""


def build(options: dict[str, Any]) -> Application:
    """What ``import_path`` names. Raises pydantic's ValidationError for arguments that do not exist."""
    given = Options.model_validate(options).model_dump(mode="json", exclude_unset=True)
    application: Application = Slimserve.bind(given)
    return application
