"""Merging an expert into another gives the same result as the original tool and as doing it by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DATA, EXPECTED, assert_same, files_below, load

import vraxion_ckpt as vc
from vraxion_ckpt.errors import InvariantError, OptionError, TransformError

NAMED, EXPERTS3 = DATA / "named_experts3.pt", DATA / "wallclock_experts3.pt"
MODULAR = [DATA / name for name in ("modular_experts3", "modular_gc", "modular_adapter_experts")]
NAMES = load(NAMED)["param_names"]  # of the run that EXPERTS3 comes from, too
EXPERT = re.compile(r"head\.experts\.(\d+)(.*)")


def prune(gone: int | None = None, into: int = 0, **options: Any) -> tuple[str, dict[str, Any]]:
    return "prune_merge", {"merge_from": gone, "merge_into": into, **options}


def middle(gone: int, into: int) -> tuple[str, dict[str, Any]]:
    return prune(gone, into, renumber=True, allow_tenured=True)


# --- the same done by hand, on what torch.load returns ---


def renamed(name: str, gone: int) -> str | None:
    found = EXPERT.fullmatch(name)
    if not found:
        return name
    number = int(found[1])
    return None if number == gone else f"head.experts.{number - (number > gone)}{found[2]}"


def renamed_keys(entries: dict[str, Any], gone: int) -> dict[str, Any]:
    return {renamed(name, gone): value for name, value in entries.items() if renamed(name, gone) is not None}


def pruned_by_hand(payload: dict[str, Any], gone: int, into: int, key: str = "optim") -> dict[str, Any]:
    """Prune a payload of a monolith or router.state by hand, without using the package."""
    model = OrderedDict(renamed_keys(payload["model"], gone))
    if hasattr(payload["model"], "_metadata"):
        model._metadata = OrderedDict(renamed_keys(payload["model"]._metadata, gone))
    owners = [into if owner == gone else owner for owner in model["router_map"].tolist()]
    model["router_map"] = torch.tensor([o - (o > gone) for o in owners], dtype=model["router_map"].dtype)
    names = payload.get("param_names", NAMES)
    stay = [i for i, name in enumerate(names) if renamed(name, gone) is not None]
    (group,) = payload[key]["param_groups"]
    state = {new: payload[key]["state"][old] for new, old in enumerate(stay) if old in payload[key]["state"]}
    optimizer = {"state": state, "param_groups": [{**group, "params": list(range(len(stay)))}]}
    after = {**payload, "model": model, key: optimizer, "num_experts": payload["num_experts"] - 1}
    if "param_names" in payload:
        after["param_names"] = [renamed(names[i], gone) for i in stay]
    return {**after, "prune": {"merge_from": gone, "merge_into": into, "router_remap": f"{gone}->{into}"}}


def without_ours(path: Path) -> dict[str, Any]:
    """Load a result without the entries under our own key."""
    payload = load(path)
    del payload["vraxion_ckpt"]
    return payload


# --- against the original tool, and against the work of hands ---


def test_the_result_is_the_original_tools_but_for_the_removed_experts_module_version(tmp_path):
    vc.convert(NAMED, tmp_path / "pruned.pt", transforms=["prune_merge:merge_from=2,merge_into=0"])
    theirs = load(EXPECTED / "named_experts3.prune_2_into_0.pt")
    assert theirs["model"]._metadata.pop("head.experts.2") == {"version": 1}
    assert_same(without_ours(tmp_path / "pruned.pt"), theirs)


def test_the_last_expert_is_removed_if_none_is_named(tmp_path):
    done = vc.convert(NAMED, tmp_path / "pruned.pt", transforms=[prune()])
    assert (done.experts_before, done.experts_after, done.addresses_moved) == (3, 2, 21)
    assert_same(without_ours(tmp_path / "pruned.pt"), pruned_by_hand(load(NAMED), 2, 0))


@pytest.mark.parametrize("source", [NAMED, EXPERTS3], ids=lambda path: path.stem)
@pytest.mark.parametrize(("gone", "into"), [(1, 0), (1, 2), (0, 1), (0, 2), (2, 1)])
def test_ids_above_the_removed_one_move_down_everywhere(gone, into, source, tmp_path):
    vc.convert(source, tmp_path / "pruned.pt", transforms=[middle(gone, into)])
    assert_same(without_ours(tmp_path / "pruned.pt"), pruned_by_hand(load(source), gone, into))
    assert vc.open(tmp_path / "pruned.pt").optimizer.params == [
        renamed(name, gone) for name in NAMES if renamed(name, gone) is not None
    ]


@pytest.mark.parametrize("source", MODULAR, ids=lambda path: path.name)
@pytest.mark.parametrize(("gone", "into"), [(1, 0), (1, 2), (0, 2), (2, 0)])
def test_shards_and_rows_of_a_modular_directory_are_renumbered(gone, into, source, tmp_path):
    vc.convert(source, tmp_path / "pruned", to="modular", transforms=[middle(gone, into)])
    stay = [i for i in range(3) if i != gone]
    for new, old in enumerate(stay):
        before, after = (
            folder / "experts" / f"expert_{i:03d}.pt" for folder, i in ((source, old), (tmp_path / "pruned", new))
        )
        assert before.exists() == after.exists()
        if before.exists():
            assert_same(load(after), load(before))
    assert not (tmp_path / "pruned/experts/expert_002.pt").exists()
    router = tmp_path / "pruned/system/router.state"
    by_hand = pruned_by_hand(load(source / "system/router.state"), gone, into)
    assert_same(dict(load(router)["model"]), dict(by_hand.pop("model")))
    assert_same({key: value for key, value in without_ours(router).items() if key != "model"}, by_hand)
    rows, meta = (json.loads((folder / "experts/meta.json").read_text()) for folder in (source, tmp_path / "pruned"))
    assert meta["experts"] == [{**rows["experts"][old], "id": new} for new, old in enumerate(stay)]
    assert meta["deleted"] == [stay.index(i) for i in rows["deleted"] if i in stay]
    assert meta["num_experts"] == 2


@pytest.mark.parametrize("source", MODULAR, ids=lambda path: path.name)
def test_a_modular_directory_and_a_monolith_shrink_alike(source, tmp_path):
    vc.convert(source, tmp_path / "whole.pt")
    vc.convert(source, tmp_path / "one.pt", transforms=[middle(0, 2)])
    vc.convert(tmp_path / "whole.pt", tmp_path / "two.pt", transforms=[middle(0, 2)])
    vc.convert(tmp_path / "whole.pt", tmp_path / "modular", to="modular", transforms=[middle(0, 2)])
    vc.convert(tmp_path / "modular", tmp_path / "three.pt")
    one, *others = (vc.open(tmp_path / f"{name}.pt") for name in ("one", "two", "three"))
    for other in others:
        assert_same(one.state_dict(), other.state_dict())
        assert one.optimizer.params == other.optimizer.params
        assert_same(one.optimizer.state, other.optimizer.state)
        assert (one.lifecycle, one.head.deleted) == (other.lifecycle, other.head.deleted)


def test_a_garbage_collected_expert_is_removed_for_good(tmp_path):
    vc.convert(DATA / "modular_gc", tmp_path / "pruned.pt", transforms=[prune(1, 2, renumber=True)])
    pruned = vc.open(tmp_path / "pruned.pt")
    assert (list(pruned.head.experts), pruned.head.deleted) == ([0, 1], frozenset())
    assert not any(name.startswith("head.experts.2") for name in (*pruned.optimizer.params, *pruned.param_names))


def test_a_split_that_is_merged_back_leaves_everything_as_it_was(tmp_path):
    split = "mitosis_split:parent=1,addresses=[1,4,7]"
    vc.convert(NAMED, tmp_path / "back.pt", transforms=[split, prune(3, 1)])
    back = without_ours(tmp_path / "back.pt")
    del back["mitosis"], back["prune"]
    assert_same(back, load(NAMED))


# --- experts of all kinds ---


def state_of(*experts: int, leaves: tuple[str, ...] = ("down.weight", "up.weight"), **more: torch.Tensor) -> dict:
    """Return a state dict with experts in the given order, filled with id + 1 because zeros mean hibernated."""
    state = OrderedDict(theta=torch.ones(3), router_map=torch.arange(40) % len(experts), **more)
    state |= {f"head.experts.{i}.{leaf}": torch.full((2, 2), float(i + 1)) for i in experts for leaf in leaves}
    return state


def optimizer_of(*groups: list[str], without: str = "-") -> dict[str, Any]:
    """Return an optimizer with names in its groups and slots filled with the id of their expert."""
    names = [name for group in groups for name in group]
    ids = {name: i for i, name in enumerate(names)}
    values = {name: float(found[1]) if (found := EXPERT.fullmatch(name)) else -1.0 for name in names}
    shapes = {name: (2, 2) if EXPERT.fullmatch(name) else (3,) for name in names}
    return {
        "state": {ids[n]: {"exp_avg": torch.full(shapes[n], values[n])} for n in names if not n.startswith(without)},
        "param_groups": [{"lr": 0.1, "params": [ids[n] for n in group], "param_names": group} for group in groups],
    }


def test_of_a_dozen_experts_none_is_confused_with_another(tmp_path):
    state = state_of(*range(12))
    modules = ["", "head", "head.experts", *(f"head.experts.{i}{m}" for i in range(12) for m in ("", ".down", ".up"))]
    state._metadata = OrderedDict((module, {"version": i}) for i, module in enumerate(modules))
    params = [name for name in state if name != "router_map"]
    torch.save({"model": state, "optim": optimizer_of(params[::-1])}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[middle(1, 10)])
    old = [0, *range(2, 12)]
    pruned = vc.open(tmp_path / "b.pt")
    for leaf in ("down.weight", "up.weight"):
        assert [float(expert[leaf][0, 0]) - 1 for expert in pruned.head.experts.values()] == old
        slots = [pruned.optimizer.state[f"head.experts.{i}.{leaf}"]["exp_avg"] for i in range(11)]
        assert [float(slot[1, 1]) for slot in slots] == old
    owners = [10 if owner == 1 else owner for owner in state["router_map"].tolist()]
    assert pruned.router_map.tolist() == [old.index(owner) for owner in owners]
    assert pruned.optimizer.params == [n for name in params[::-1] if (n := renamed(name, 1)) is not None]
    assert pruned.metadata == renamed_keys(state._metadata, 1)
    assert list(pruned.metadata) == list(renamed_keys(state._metadata, 1))


def test_the_order_of_experts_in_the_state_dict_stays(tmp_path):
    torch.save({"model": state_of(2, 0, 3, 1)}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[middle(0, 3)])
    assert {i: float(e["up.weight"][0, 0]) - 1 for i, e in vc.open(tmp_path / "b.pt").head.experts.items()} == {
        1: 2,
        2: 3,
        0: 1,
    }
    assert list(vc.open(tmp_path / "b.pt").head.experts) == [1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16, torch.int64])
def test_a_router_map_keeps_its_type_and_the_source_its_values(dtype, tmp_path):
    router = (torch.arange(40) % 3).to(dtype)
    torch.save({"model": {**state_of(0, 1, 2), "router_map": router}}, tmp_path / "a.pt")
    before = vc.open(tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[middle(0, 2)])
    after = load(tmp_path / "b.pt")["model"]["router_map"]
    assert after.dtype == dtype
    assert after.tolist() == [[1, 0, 1][address % 3] for address in range(40)]
    assert before.router_map.tolist() == router.tolist()


def test_experts_that_are_divided_over_groups_are_not_merged(tmp_path):
    leaves = ("weight",)
    groups = [["theta", "head.experts.0.weight"], ["head.experts.1.weight"], ["head.experts.2.weight"]]
    torch.save({"model": state_of(0, 1, 2, leaves=leaves), "optim": optimizer_of(*groups)}, tmp_path / "a.pt")
    with pytest.raises(vc.CkptError, match="experts are divided"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[middle(1, 0)])


def test_experts_of_which_some_are_frozen_shrink(tmp_path):
    names = ["theta", "head.experts.2.weight"]
    torch.save({"model": state_of(0, 1, 2, leaves=("weight",)), "optim": optimizer_of(names)}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[middle(0, 1)], optimizer="partial")
    assert vc.open(tmp_path / "b.pt").optimizer.params == ["theta", "head.experts.1.weight"]


# --- ties ---


def tied(*pairs: tuple[str, str]) -> dict[str, torch.Tensor]:
    state = {"embedding": torch.ones(2, 2), **state_of(0, 1, 2)}
    for name, other in pairs:
        state[name] = state[other]
    return state


UP0, UP1, UP2, DOWN2 = (f"head.experts.{name}.weight" for name in ("0.up", "1.up", "2.up", "2.down"))


@pytest.mark.parametrize(
    ("pair", "gone", "says"),
    [
        ((UP2, "embedding"), 2, f"[{UP2}]: is tied to embedding"),
        ((UP2, UP0), 2, f"[{UP2}]: is tied to {UP0}"),
        ((UP2, UP0), 0, f"[{UP0}]: is tied to {UP2}"),
    ],
)
def test_an_expert_that_is_tied_to_what_stays_is_not_removed(pair, gone, says, tmp_path):
    torch.save({"model": tied(pair)}, tmp_path / "a.pt")
    with pytest.raises(TransformError) as refused:
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[middle(gone, 1)])
    assert says in str(refused.value)
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize("pair", [(UP2, DOWN2), (UP1, UP0)])
def test_ties_within_the_removed_expert_or_among_others_are_no_hindrance(pair, tmp_path):
    torch.save({"model": tied(pair)}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[prune()])
    after = load(tmp_path / "b.pt")["model"]
    assert (after[UP1].data_ptr() == after[UP0].data_ptr()) == (UP1 in pair)


# --- plans and requests ---


def asking(folder: Path, **request: Any) -> Path:
    torch.save({**load(NAMED), "mitosis": request}, folder / "asking.pt")
    return folder / "asking.pt"


@pytest.mark.parametrize(
    ("parent", "step"),
    [
        (2, prune(2, 0)),  # it is gone
        (0, prune(2, 0)),  # it has more addresses than when it was asked for
        (2, middle(1, 0)),  # it is another one now
        (7, prune(2, 0)),  # splits that follow could make it one
    ],
)
def test_a_request_for_an_expert_that_is_not_as_it_was_is_dropped_with_a_warning(parent, step, tmp_path):
    source = asking(tmp_path, parent_expert=parent, hot_addresses=[parent])
    with pytest.warns(vc.CkptWarning, match=f"to split expert {parent} no longer fits"):
        vc.convert(source, tmp_path / "b.pt", transforms=[step])
    assert "mitosis" not in load(tmp_path / "b.pt")


@pytest.mark.parametrize("request_", [{"parent_expert": 1, "hot_addresses": [1, 4]}, {"parent_expert": None}])
def test_a_request_that_still_fits_or_never_did_is_kept(request_, tmp_path):
    vc.convert(asking(tmp_path, **request_), tmp_path / "b.pt", transforms=[prune(2, 0)])
    assert load(tmp_path / "b.pt")["mitosis"] == request_


def test_a_request_that_was_kept_is_carried_out(tmp_path):
    source = asking(tmp_path, parent_expert=1, hot_addresses=[1, 4])
    vc.convert(source, tmp_path / "b.pt", transforms=[prune(2, 0), "arc_meta", "mitosis_split:noise=0"])
    after = load(tmp_path / "b.pt")["model"]["router_map"].tolist()
    assert after == [2 if a in (1, 4) else [0, 1, 0][a % 3] for a in range(64)]


def test_a_plan_is_forgotten(tmp_path):
    visits = ("arc_meta", {"visits": EXPECTED / "wallclock_experts3.visits.json"})
    vc.convert(NAMED, tmp_path / "planned.pt", transforms=[visits])
    assert vc.open(tmp_path / "planned.pt").plan is not None
    vc.convert(tmp_path / "planned.pt", tmp_path / "pruned.pt", transforms=[prune()])
    assert vc.open(tmp_path / "pruned.pt").plan is None
    with pytest.raises(TransformError, match="there is no plan"):
        vc.convert(NAMED, tmp_path / "no.pt", transforms=[visits, middle(0, 1), "mitosis_split"])


# --- refusals ---


def saved(**payload: Any) -> Callable[[Path], Path]:
    """Return a function that saves the payload in a folder."""

    def make(folder: Path) -> Path:
        torch.save(payload, folder / "variant.pt")
        return folder / "variant.pt"

    return make


def all_deleted_but_expert_0(folder: Path) -> Path:
    shutil.copytree(DATA / "modular_gc", folder / "gc")
    (folder / "gc/experts/expert_002.pt").unlink()
    meta = folder / "gc/experts/meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "deleted": [1, 2]}))
    return folder / "gc"


NO_RING = {name: tensor for name, tensor in state_of(0, 1, 2).items() if name != "router_map"}
SOURCES: dict[str, Callable[[Path], Path]] = {
    "experts": lambda _: EXPERTS3,
    "single": lambda _: DATA / "wallclock_single.pt",
    "one deleted": lambda _: DATA / "modular_gc",  # expert 1; 0 and 2 are tenured
    "two deleted": all_deleted_but_expert_0,
    "no head": saved(model={"router_map": torch.zeros(4, dtype=torch.int64)}),
    "no ring": saved(model=NO_RING),
    "one": saved(model=state_of(0)),
}

REFUSED = [
    ("no head", prune(), r"^\[prune_merge\]: the model has no head"),
    ("single", prune(), r"head is single"),
    ("no ring", prune(), r"no router_map"),
    ("one", prune(), r"only expert cannot be removed\n.*experts_to_single"),
    ("one", prune(0, 1), r"only expert"),
    ("experts", prune(3), r"no expert 3; there are 3"),
    ("experts", prune(2, 3), r"no expert 3; there are 3"),
    ("experts", prune(2, 2), r"merge_from and merge_into are both 2\n.*merge_from="),
    ("experts", prune(None, 2), r"merge_from and merge_into are both 2"),
    ("experts", prune(1), r"expert 1 is not the last; .* up to 2, would move down by one\n.*renumber=true"),
    ("one deleted", middle(0, 1), r"expert 1 was deleted; .*\n.*merge_into="),
    ("one deleted", prune(2, 0), r"expert 2 is tenured\n.*allow_tenured=true"),
    ("one deleted", prune(0, 2, renumber=True), r"expert 0 is tenured"),
    ("two deleted", prune(2, 0), r"expert 2 is tenured"),
    ("two deleted", middle(0, 1), r"expert 1 was deleted"),
]


@pytest.mark.parametrize(("source", "step", "says"), REFUSED)
def test_what_cannot_be_pruned_is_refused_and_nothing_is_written(source, step, says, tmp_path):
    made = SOURCES[source](tmp_path)
    before = files_below(tmp_path)
    for target in ("new.pt", "new/"):
        with pytest.raises(TransformError, match=says):
            vc.convert(made, f"{tmp_path}/{target}", transforms=[step])
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [("", "'merge_into' is required"), ("merge_into=-1", "merge_into"), ("merge_into=0,merge_from=-1", "merge_from")],
)
def test_options_that_mean_nothing_are_refused(options, says, tmp_path):
    with pytest.raises(OptionError, match=says):
        vc.convert(EXPERTS3, tmp_path / "new.pt", transforms=[f"prune_merge:{options}"])


def test_half_an_optimizer_in_another_place_is_not_left_as_it_was(tmp_path):
    torch.save(
        {"model": state_of(0, 1, 2), "elsewhere": {**optimizer_of(["theta"]), "param_groups": 1}}, tmp_path / "a.pt"
    )
    with pytest.raises(TransformError, match=r"elsewhere.*cannot be updated"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[prune()])


def test_a_router_map_that_is_tied_to_another_tensor_is_not_changed_under_one_name(tmp_path):
    state = state_of(0, 1, 2)
    torch.save({"model": {**state, "alias": state["router_map"]}}, tmp_path / "a.pt")
    with pytest.raises(InvariantError, match="shared memory before and no longer do"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[prune()])


def test_a_prune_and_a_split_that_give_the_old_count_leave_no_optimizer_behind_either(tmp_path):
    model = {**state_of(0, 1, 2), "router_map": torch.tensor([0, 1, 2, 0, 1, 2])}
    chain = [middle(0, into=1), "mitosis_split:parent=0,addresses=[0],noise=0"]
    torch.save({"model": model, "elsewhere": {**optimizer_of(["theta"]), "param_groups": 1}}, tmp_path / "a.pt")
    with pytest.raises(TransformError, match=r"elsewhere.*cannot be updated"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=chain)
    torch.save({"model": model, "ema": {"head.experts.0.up.weight": torch.ones(1)}}, tmp_path / "c.pt")
    with pytest.raises(TransformError) as refusal:
        vc.convert(tmp_path / "c.pt", tmp_path / "d.pt", transforms=chain)
    assert refusal.value.key == "ema"


def test_a_tensor_tied_to_an_expert_stays_tied_when_that_is_renumbered(tmp_path):
    model = {**state_of(0, 1, 2, 3), "router_map": torch.arange(8) % 4}
    model["embedding"] = model["head.experts.2.up.weight"]
    torch.save({"model": model}, tmp_path / "a.pt")
    vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=[middle(1, into=0)])
    after = load(tmp_path / "b.pt")["model"]
    assert after["embedding"].data_ptr() == after["head.experts.1.up.weight"].data_ptr()
    assert_same(after["embedding"], model["embedding"])


def test_the_summary_tells_renumbered_from_moved():
    done = vc.convert(NAMED, "nowhere.pt", transforms=[middle(1, into=0)], dry_run=True)
    assert done.addresses_moved == 21
    assert (done.tensors.renamed, done.tensors.dropped, done.tensors.changed, done.tensors.created) == (2, 2, 1, 0)
    assert "3 → 2 experts, 21 addresses moved" in done.history[0].summary


def test_a_trainer_that_found_no_parent_asks_for_nothing(tmp_path):
    payload = load(NAMED)
    payload["mitosis"] = {"parent_expert": None, "hot_addresses": []}
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(TransformError, match="there is no plan"):
        vc.convert(tmp_path / "a.pt", tmp_path / "b.pt", transforms=["mitosis_split"])
