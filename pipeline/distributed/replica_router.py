"""A Serve request router that answers 503 while no replica is running.

Ray Serve's own routers hold a request until a replica is available, without a time limit. A fast 503 lets the
client retry.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.exceptions import BackPressureError

RETRY_AFTER_SECONDS = 2.0


class NoReplicaError(BackPressureError):
    """Answered by Ray Serve's proxy with 503, `Retry-After`, and the message as text."""

    def __init__(self) -> None:
        super().__init__(0, 0, 503, RETRY_AFTER_SECONDS)
        self._message = "the API is being restarted: try again"


# Ray sends this class to the proxies by value: they need not have this package.
class FailFastRouter(PowerOfTwoChoicesRequestRouter):
    """Chooses replicas as `PowerOfTwoChoicesRequestRouter` does; NoReplicaError if there is none."""

    async def _choose_replica_for_request(self, pending_request: Any, *, is_retry: bool = False) -> Any:
        if not self.curr_replicas:
            raise NoReplicaError
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Called when a request to a replica has failed."""
        super().on_replica_actor_died(replica_id)
        self._refuse_if_alone()

    def update_replicas(self, replicas: list[Any]) -> None:
        """Called when the controller's list of replicas has changed."""
        super().update_replicas(replicas)
        self._refuse_if_alone()

    def _refuse_if_alone(self) -> None:
        """Refuse the pending requests if no replica is left."""
        if self.curr_replicas:
            return
        for request in list(self._pending_requests_to_fulfill):
            if not request.future.done():
                request.future.set_exception(NoReplicaError())
                self._remove_pending_request_from_indices(request)
