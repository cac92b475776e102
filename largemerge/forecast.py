"""What a planned merge will take: seconds by stage, and what each of its ranks will hold, move and compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from largemerge.calibration import CalibrationOutline
from largemerge.cluster import Links
from largemerge.estimate import footprint
from largemerge.merge_plan import MergePlan, Preparation
from largemerge.planning import Machines, process_bytes, workload_of
from largemerge.probe import measure_rates
from largemerge.rank_plan import plan_ranks, share_work
from largemerge.rank_timing import estimate_rank_seconds
from largemerge.sharing import samples_at_once
from largemerge.timing import Rates, estimate_seconds
from largemerge.workload import Workload, batch_shapes, split_shapes

_MEMORY_TRIPS, _LOCAL_LATENCY = 5, 0.5e-3  # of a byte between processes of one machine: copied, and added up


def forecast(
    prepared: Preparation, outlines: Sequence[CalibrationOutline], machines: Machines, *, probe: bool
) -> MergePlan:
    """The plan, with times and ranks.

    Args:
        prepared: From `make_plan`, for the same machines.
        outlines: Of every candidate's calibration data.
        machines: That will compute.
        probe: Measure this machine for some seconds; without, only a cluster's times are told.
    """
    plan = prepared.plan
    workload = partial(workload_of, plan.config, prepared.inputs, prepared.rehearsal, plan.blocks, plan.outside)
    shapes = batch_shapes(outlines, None)
    whole = workload(shapes)
    behind = plan.placement.writes_behind(plan.device)
    timed = not plan.problems and (probe or machines.cluster is not None)
    if machines.num_ranks == 1 and machines.cluster is None:
        rates = _rates(prepared, machines, whole) if timed else None
        if rates is None:
            return plan
        return replace(plan, seconds=estimate_seconds(whole, plan.placement, rates, writes_behind=behind))
    batches = split_shapes(
        shapes, samples_at_once(plan.placement.samples, sum(plan.num_samples.values()), machines.num_ranks)
    )
    works = share_work(batches, plan.blocks, prepared.rehearsal, workload, machines.num_ranks)
    held = partial(
        footprint,
        placement=plan.placement,
        device=plan.device,
        before=process_bytes(machines),
        eight_bit=plan.config.memory.hidden_states_8bit,
        limited=plan.config.memory.host is not None,
    )
    plan = replace(plan, ranks=plan_ranks(whole, works, held, plan.placement))
    if not timed:
        return plan
    rates = _rates(prepared, machines, whole)
    parts = [each.work for each in works]
    moved = max(rank.bytes_communicated for rank in plan.ranks)
    links = _links(machines, rates)
    seconds = estimate_rank_seconds(whole, parts, plan.placement, rates, links, moved, writes_behind=behind)
    return replace(plan, seconds=seconds, measured=machines.cluster is None)


def _rates(prepared: Preparation, machines: Machines, work: Workload) -> Rates:
    plan = prepared.plan
    if machines.cluster is not None:
        return machines.cluster.rates(plan.compute_dtype)
    return measure_rates(
        work,
        prepared.inputs.candidates[0],
        plan.limits.scratch,
        plan.device,
        plan.placement.samples,
        at_once=machines.num_ranks,
    )


def _links(machines: Machines, rates: Rates) -> Links:
    if machines.cluster is not None:
        return machines.cluster.links()
    return Links(rates.memory / _MEMORY_TRIPS, _LOCAL_LATENCY, machines.num_ranks)
