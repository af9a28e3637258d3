"""Choose which expert to split and which addresses its child takes; changes no tensor.

The plan is attached to the checkpoint. If `output` is given, the plan is also written as a ``mitosis_meta_v1`` file. It
has the entries that VRAXION's own planner writes, and two predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from vraxion_ckpt.plugin_api import (
    HOW_TO_COUNT_VISITS,
    Checkpoint,
    Effect,
    InconsistentError,
    Ints,
    SplitPlan,
    Transform,
    TransformError,
    Visits,
    Weights,
    as_weights,
    auto_arc_length,
    check_expert,
    count,
    dump_json,
    exact_sum,
    head_of,
    hookimpl,
    hottest_arc,
    lacking_in_request,
    load_visits,
    plan_as_json,
    plan_from_request,
    requested_by_trainer,
    router_owners,
    run_probes,
    total_by_owner,
)

_HOW_TO_SUPPLY = (
    "give a file (arc_meta:visits=FILE), let the trainer leave its `mitosis` request in the payload, or install a "
    "plugin with a probe_visits hook"
)


def _about_runtime() -> str:
    """Return an addition to a hint if VRAXION's runtime, which can count visits, cannot be imported; else ""."""
    try:
        found = find_spec("vraxion") is not None
    except (ImportError, ValueError):
        found = False
    if found:
        return ""
    return (
        ". The vraxion_probe plugin could count them by running the model, but VRAXION's runtime is missing: "
        'put its folder "Golden Code" on PYTHONPATH'
    )


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


class ArcMeta(Transform):
    """Plan a split: find the busiest expert and the hottest arc of its addresses."""

    name: ClassVar[str] = "arc_meta"

    visits: Path | None = Field(None, description="visits per address: .json, .npy or .csv")
    policy: Literal["ptr_hist_arc", "topk_loss"] = Field(
        "ptr_hist_arc",
        description="ptr_hist_arc: the arc with most visits; topk_loss: the arc with most loss, cut to top_k addresses",
    )
    parent: int | None = Field(None, ge=0, description="expert to split; the busiest if not given")
    arc_len: Annotated[int | None, BeforeValidator(_auto_is_none)] = Field(
        None,
        description="number of addresses in the arc; auto: max(16, ring // (2 * experts))",
        json_schema_extra={"anyOf": [{"type": "integer"}, {"type": "null"}, {"const": "auto"}], "default": "auto"},
    )
    top_k: int = Field(256, ge=1, description="for topk_loss: the largest number of addresses to move")
    allow_empty_parent: bool = Field(False, description="allow a plan that leaves the parent without addresses")
    output: Path | None = Field(None, description="also write the plan to this JSON file")

    def effect(self) -> Effect:
        return Effect.exact()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        router = checkpoint.router_map
        if checkpoint.head is None or router is None:
            raise TransformError("the model has no router_map, or no head")
        owners = router_owners(router)
        request = requested_by_trainer(checkpoint) if self.visits is None else None
        if request is not None:
            self._refuse_idle_options(request[0])
            checkpoint.plan = self._adopt(request, checkpoint, owners)
        else:
            checkpoint.plan = self._choose(self._visits(checkpoint, len(owners)), checkpoint, owners)
        return checkpoint

    def side_files(self, checkpoint: Checkpoint) -> Mapping[Path, bytes]:
        if self.output is None or checkpoint.plan is None:
            return {}
        return {self.output: dump_json(plan_as_json(checkpoint.plan))}

    def _refuse_idle_options(self, requested: int) -> None:
        """Raise TransformError if options are given that have no effect because the trainer requests a split."""
        idle = sorted(self.model_fields_set & {"policy", "arc_len", "top_k"})
        if self.parent not in (None, requested):
            idle.append("parent")
        if idle:
            raise TransformError(
                f"the trainer's `mitosis` request (expert {requested}) makes these options useless: {', '.join(idle)}",
                hint="leave them out, or give visits=FILE to ignore the request",
            )

    def _visits(self, checkpoint: Checkpoint, ring_len: int) -> Visits:
        if self.visits is not None:
            return load_visits(self.visits, ring_len)
        found = run_probes(checkpoint)
        if found is None:
            lacking = lacking_in_request(checkpoint)
            message = "no visit counts available"
            message = f"{message}; the trainer's `mitosis` request {lacking}" if lacking else message
            hint = HOW_TO_COUNT_VISITS if lacking else _HOW_TO_SUPPLY
            raise TransformError(message, hint=hint + _about_runtime())
        try:
            probed = Visits(
                as_weights(found.visits),
                as_weights(found.loss_sum) if found.loss_sum is not None else None,
                found.note,
            )
        except ValueError as error:
            raise InconsistentError(f"a probe_visits hook returned invalid visits: {error}") from None
        if len(probed.visits) != ring_len:
            raise InconsistentError(
                f"a probe_visits hook returned {count(len(probed.visits), 'visit')} for {count(ring_len, 'address')}"
            )
        return probed

    def _choose(self, visits: Visits, checkpoint: Checkpoint, owners: Ints) -> SplitPlan:
        weights = visits.visits if self.policy == "ptr_hist_arc" else visits.loss_sum
        if weights is None:
            raise TransformError("topk_loss needs the loss per address", hint="give visits with a loss_sum")
        experts = checkpoint.num_experts
        totals = total_by_owner(weights, owners, experts)
        parent = self.parent if self.parent is not None else max(range(experts), key=lambda e: (totals[e], -e))
        check_expert(head_of(checkpoint), parent, hint="pass parent=")
        length = auto_arc_length(len(owners), experts) if self.arc_len is None else self.arc_len
        owned = owners == parent
        arc, score = hottest_arc(np.where(owned, weights, 0), max(1, min(len(owners), length)))
        in_arc = arc.addresses[owned[arc.addresses]]
        hot = self._hottest(in_arc, visits) if self.policy == "topk_loss" else in_arc
        self._guard(hot, parent, int(owned.sum()))
        shares = _Shares(visits.visits, owners, parent, hot, experts)
        metrics: dict[str, int | float] = {
            "parent_share": shares.parent,
            "ptr_samples": exact_sum(visits.visits),
            "arc_score": score,
            "dropped_non_parent": arc.length - len(in_arc),
            "predicted_parent_share": shares.parent_after,
            "predicted_max_share": shares.largest_after,
        }
        addresses = tuple(hot.tolist())
        window = (arc.start, arc.length)
        return SplitPlan(
            parent, addresses, window, self.policy, arc.ring_len, experts, metrics, checkpoint.step, visits.note
        )

    def _hottest(self, addresses: Ints, visits: Visits) -> Ints:
        """Return the `top_k` visited addresses with the highest mean loss, in arc order. Ties go to earlier ones."""
        assert visits.loss_sum is not None
        seen = addresses[visits.visits[addresses] > 0]
        means = visits.loss_sum[seen] / visits.visits[seen]
        best = np.argsort(-means, kind="stable")[: self.top_k]
        return seen[np.sort(best)]

    def _guard(self, hot: Ints, parent: int, owned: int) -> None:
        if not len(hot):
            raise TransformError(f"no address of expert {parent} qualifies for the split")
        if len(hot) == owned and not self.allow_empty_parent:
            raise TransformError(
                f"the plan takes all {count(owned, 'address')} of expert {parent}",
                hint="choose a smaller arc_len, or pass allow_empty_parent=true",
            )

    def _adopt(self, request: tuple[int, tuple[int, ...]], checkpoint: Checkpoint, owners: Ints) -> SplitPlan:
        """Return a plan for the split that the trainer requests."""
        parent, addresses = request
        if parent < 0 or not addresses or not 0 <= min(addresses) <= max(addresses) < len(owners):
            raise InconsistentError(
                "the trainer's request has no addresses, or one outside the ring", key="payload.mitosis"
            )
        check_expert(head_of(checkpoint), parent, hint="pass parent=")
        owned = owners == parent
        hot = np.unique(np.fromiter(addresses, np.int64, len(addresses)))
        self._guard(hot[owned[hot]], parent, int(owned.sum()))
        return plan_from_request(request, len(owners), checkpoint.num_experts, checkpoint.step)


class _Shares:
    """Shares of the visits: the parent's before and after the split, and the largest after it.

    Visits to addresses without a valid owner are not counted.
    """

    def __init__(self, visits: Weights, owners: Ints, parent: int, hot: Ints, experts: int) -> None:
        totals = total_by_owner(visits, owners, experts)
        total = sum(totals) or 1
        given = exact_sum(visits[hot])
        left = totals[parent] - given
        self.parent = totals[parent] / total
        self.parent_after = left / total
        self.largest_after = max([*totals[:parent], left, *totals[parent + 1 :], given]) / total


@hookimpl
def register_transforms() -> list[type[Transform]]:
    """Register the transform."""
    return [ArcMeta]
