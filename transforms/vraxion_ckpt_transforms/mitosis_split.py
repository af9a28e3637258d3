"""Clone an expert and give the clone part of the expert's addresses. The model grows by one expert."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from vraxion_ckpt.plugin_api import (
    HOW_TO_COUNT_VISITS,
    Checkpoint,
    Effect,
    Head,
    InconsistentError,
    IntList,
    Ints,
    StatePolicy,
    Transform,
    TransformError,
    check_expert,
    clone_expert,
    count,
    head_of_experts,
    hookimpl,
    lacking_in_request,
    load_plan,
    put_record,
    refuse_unhealthy,
    requested_by_trainer,
    router_owners,
)


class MitosisSplit(Transform):
    """Clone an expert, and give part of its addresses to the clone."""

    name: ClassVar[str] = "mitosis_split"

    parent: int | None = Field(None, ge=0, description="expert to clone; from the plan if not given")
    addresses: IntList | None = Field(None, description="addresses for the clone, like [1,3,8-15]; default: the plan's")
    meta: Path | None = Field(None, description="JSON file with parent_expert and hot_addresses, instead of the plan")
    noise: float = Field(
        1e-5, ge=0, le=1e6, allow_inf_nan=False, description="standard deviation of the noise added to the clone"
    )
    seed: int = Field(1337, description="seed of the noise; each tensor gets its own noise")
    optimizer: StatePolicy = Field(
        "copy", description="optimizer state of the clone: the parent's (copy), or none (reset)"
    )
    foreign_addresses: Literal["refuse", "allow"] = Field(
        "refuse", description="refuse or allow addresses that the parent does not own"
    )
    allow_empty_parent: bool = Field(False, description="allow a split that leaves the parent without addresses")
    allow_zero: bool = Field(False, description="allow a parent whose weights are all zero")
    allow_nan: bool = Field(False, description="allow a parent with weights that are NaN or infinite")

    def effect(self) -> Effect:
        return Effect.within_noise(self.noise) if self.foreign_addresses == "refuse" else Effect.changed()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        import torch

        head, owners = self._head_and_owners(checkpoint)
        parent, addresses = self._parent_and_addresses(checkpoint)
        taken = self._check(parent, addresses, head, owners)
        refuse_unhealthy(checkpoint, parent, allow_zero=self.allow_zero, allow_nan=self.allow_nan)
        child = head.num_experts
        dtype = checkpoint.core[head.names.router_map].dtype
        if child > torch.iinfo(dtype).max:
            raise TransformError(f"the router_map's {dtype} cannot hold expert id {child}")

        clone_expert(checkpoint, parent, child, noise=self.noise, seed=self.seed, optimizer=self.optimizer)
        router = checkpoint.core[head.names.router_map]
        moved = router.to(torch.int64, copy=True)  # torch does not index every integer dtype
        moved[torch.from_numpy(taken)] = child
        checkpoint.router_map = moved.to(router.dtype)
        checkpoint.plan = None
        record = {
            "parent": parent,
            "child": child,
            "addresses": list(addresses),
            "noise": self.noise,
        }
        put_record(
            checkpoint, "mitosis", record, known=("parent", "parent_expert", "hot_addresses", "imbalance", "slope")
        )
        return checkpoint

    def _head_and_owners(self, checkpoint: Checkpoint) -> tuple[Head, Ints]:
        head = head_of_experts(checkpoint)
        assert checkpoint.router_map is not None
        return head, router_owners(checkpoint.router_map)

    def _parent_and_addresses(self, checkpoint: Checkpoint) -> tuple[int, tuple[int, ...]]:
        """Return parent and addresses from the options, else from `meta`, the plan or the trainer's request."""
        parent, addresses = self.parent, self.addresses
        if parent is None or addresses is None or self.meta is not None:
            planned = self._planned(checkpoint)
            parent = planned[0] if parent is None else parent
            addresses = planned[1] if addresses is None else addresses
        return parent, addresses

    def _planned(self, checkpoint: Checkpoint) -> tuple[int, tuple[int, ...]]:
        if self.meta is not None:
            return load_plan(self.meta, checkpoint)
        attached = checkpoint.plan
        if attached is not None:
            assert checkpoint.router_map is not None
            made_for = (attached.router_map_len, attached.num_experts)
            if made_for != (len(checkpoint.router_map), checkpoint.num_experts):
                raise InconsistentError(
                    "the attached plan was made for "
                    f"{count(made_for[0], 'address')} and {count(made_for[1], 'expert')}",
                    hint="put arc_meta right before this step",
                )
            if attached.step != checkpoint.step:
                now = "has no known step" if checkpoint.known_step is None else f"is at step {checkpoint.step}"
                raise InconsistentError(
                    f"the attached plan was made at step {attached.step}, but the checkpoint {now}",
                    hint="put arc_meta right before this step",
                )
            return attached.parent, attached.addresses
        request = requested_by_trainer(checkpoint)
        if request is not None:
            return request
        lacking = lacking_in_request(checkpoint)
        if lacking is not None:
            message = f"there is no plan; the trainer's `mitosis` request {lacking}"
            raise TransformError(message, hint=HOW_TO_COUNT_VISITS)
        raise TransformError(
            "there is no plan", hint="put arc_meta before this step, or give meta=FILE, or parent= and addresses="
        )

    def _check(self, parent: int, addresses: tuple[int, ...], head: Head, owners: Ints) -> Ints:
        """Refuse an unsuitable parent or addresses. Return the addresses as an array."""
        check_expert(head, parent)
        if not addresses:
            raise TransformError("the list of addresses is empty")
        if not 0 <= min(addresses) <= max(addresses) < len(owners):
            off = next(address for address in addresses if not 0 <= address < len(owners))
            raise TransformError(f"address {off} is outside the ring of {len(owners)} addresses")
        taken = np.fromiter(addresses, np.int64, len(addresses))
        values, counts = np.unique(taken, return_counts=True)
        if len(values) < len(taken):
            raise TransformError(f"address {values[counts > 1][0]} is listed twice")
        foreign = taken[owners[taken] != parent]
        if len(foreign) and self.foreign_addresses == "refuse":
            raise TransformError(
                f"address {foreign[0]} belongs to expert {owners[foreign[0]]}, not to {parent} "
                f"(listed addresses of other experts: {len(foreign)})",
                hint="leave them out, or pass foreign_addresses=allow",
            )
        if len(taken) - len(foreign) == int((owners == parent).sum()) and not self.allow_empty_parent:
            raise TransformError(
                f"expert {parent} would be left without an address",
                hint="move fewer addresses, or pass allow_empty_parent=true",
            )
        return taken


@hookimpl
def register_transforms() -> list[type[Transform]]:
    """Register the transform."""
    return [MitosisSplit]
