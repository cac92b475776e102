"""Every method against its formula, written densely in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from largemerge.data_free.methods import base as pieces_module
from largemerge.data_free.methods.base import REQUIRED, Base
from largemerge.data_free.methods.table import METHODS, merge_tensors

SHAPE = (37, 24)
WEIGHTS = [0.5, 0.8, -0.3]
ALONE = sorted(name for name, row in METHODS.items() if row.auxiliary_parameter is None)


def models(
    count: int = 3, shape: tuple[int, ...] = SHAPE, spread: float = 0.2
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator)
    return base, [base + spread * torch.randn(shape, generator=generator) for _ in range(count)]


def wide(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.acos(max(-1.0, min(1.0, ((a * b).sum() / (a.norm() * b.norm())).item())))


def on_sphere(t: float, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    theta = angle(a, b)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def largest_kept(delta: torch.Tensor, density: float, dropped: float = 0.0) -> torch.Tensor:
    """Keeps the largest elements, but for a share of even larger ones."""
    order = delta.abs().flatten().argsort(descending=True, stable=True)
    top = int(dropped * delta.numel())
    mask = torch.zeros(delta.numel(), dtype=delta.dtype)
    mask[order[top : top + int(density * delta.numel())]] = 1
    return delta * mask.view(delta.shape)


def elected(deltas: torch.Tensor, weights: torch.Tensor, *, normalize: bool) -> torch.Tensor:
    weighted = deltas * weights
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = weighted.sign() == sign
    total = (weighted * agree).sum(0)
    divisor = (weights * agree).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor) if normalize else total


def check(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_linear() -> None:
    _, tensors = models()
    total = sum(w * t for w, t in zip(WEIGHTS, wide(tensors), strict=True))
    check(merge_tensors("linear", tensors, per_model={"weight": WEIGHTS}), total / sum(WEIGHTS))
    check(merge_tensors("linear", tensors, per_model={"weight": WEIGHTS}, normalize=False), total)


def test_task_arithmetic_and_negation() -> None:
    base, tensors = models()
    deltas = [t - base.double() for t in wide(tensors)]
    total = sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True))
    check(merge_tensors("task_arithmetic", tensors, base, per_model={"weight": WEIGHTS}), base + total)
    scaled = merge_tensors(
        "task_arithmetic", tensors, base, per_model={"weight": WEIGHTS}, normalize=True, **{"lambda": 0.7}
    )
    check(scaled, base + 0.7 * total / sum(WEIGHTS))
    forgotten = merge_tensors("task_arithmetic", tensors[:1], base, per_model={"weight": [-1.0]})
    check(forgotten, base - deltas[0])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (41,), (5, 3, 4, 2)])
def test_ties(normalize: bool, shape: tuple[int, ...]) -> None:
    base, tensors = models(shape=shape)
    per_model = {"weight": WEIGHTS, "density": [0.3, 0.5, 1.0]}
    deltas = torch.stack(
        [largest_kept((t - base).double(), p) for t, p in zip(tensors, per_model["density"], strict=True)]
    )
    weights = torch.tensor(WEIGHTS, dtype=torch.float64).view(-1, *[1] * len(shape))
    expected = base + elected(deltas, weights, normalize=normalize)
    check(merge_tensors("ties", tensors, base, per_model=per_model, normalize=normalize), expected)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(method: str) -> None:
    base, tensors = models()
    per_model = {"weight": WEIGHTS, "density": [0.6] * 3, "gamma": [0.05] * 3}
    deltas = torch.stack([largest_kept((t - base).double(), 0.6, 0.05) for t in tensors])
    weights = torch.tensor(WEIGHTS, dtype=torch.float64).view(-1, 1, 1)
    plain = (deltas * weights).sum(0)
    expected = plain if method == "breadcrumbs" else elected(deltas, weights, normalize=False)
    check(merge_tensors(method, tensors, base, per_model=per_model), base + expected)


def test_rescaling_keeps_the_sum_of_magnitudes() -> None:
    base, tensors = models(1)
    per_model = {"weight": [1.0], "density": [0.3]}
    delta = (tensors[0] - base).double()
    kept = largest_kept(delta, 0.3)
    expected = base + kept * delta.abs().sum() / kept.abs().sum()
    check(merge_tensors("ties", tensors, base, per_model=per_model, rescale=True), expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_right_share_and_the_norm(method: str) -> None:
    base, tensors = models(1, (600, 500))
    found = merge_tensors(method, tensors, base, per_model={"weight": [1.0], "density": [0.3]})
    delta, change = (tensors[0] - base).double(), (found - base).double()
    kept = change.abs() > 1e-7
    assert kept.double().mean().item() == pytest.approx(0.3, abs=0.005)
    assert change.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-4)
    ratio = (change / delta)[kept & (delta.abs() > 0.01)]
    assert ratio.std() < 0.01 * ratio.mean(), "all that is kept is scaled alike"
    halves = kept[:300].double().mean(), kept[300:].double().mean()
    assert abs(halves[0] - halves[1]) < 0.01, "everywhere"


def test_random_numbers_are_those_of_the_seed_the_tensor_and_the_model() -> None:
    base, tensors = models(1)
    per_model = {"weight": [0.5, 0.5], "density": [0.5, 0.5]}

    def merged(**more: Any) -> torch.Tensor:
        return merge_tensors("dare_linear", tensors * 2, base, per_model=per_model, **more)

    assert torch.equal(merged(seed=1, name="a"), merged(seed=1, name="a"))
    assert not torch.equal(merged(seed=1, name="a"), merged(seed=2, name="a"))
    assert not torch.equal(merged(seed=1, name="a"), merged(seed=1, name="b"))
    change = merged() - base
    halves = {round(value, 3) for value in (change / (tensors[0] - base)).flatten().tolist()}
    assert len(halves) > 2, "two models of one tensor are not sparsified alike"


def test_della_keeps_large_elements_more_often() -> None:
    base, tensors = models(1, (400, 1000))
    per_model = {"weight": [1.0], "density": [0.5], "epsilon": [0.3]}
    found = merge_tensors("della_linear", tensors, base, per_model=per_model, rescale=False)
    ranks = (tensors[0] - base).abs().argsort(dim=1).argsort(dim=1).double() / 999
    kept = ((found - base).abs() > 1e-7).double()
    for low in (0.0, 0.25, 0.5, 0.75):
        part = (ranks >= low) & (ranks < low + 0.25)
        assert kept[part].mean().item() == pytest.approx(0.2 + 0.6 * (low + 0.125), abs=0.01)


def test_epsilon_must_leave_room() -> None:
    base, tensors = models(1)
    with pytest.raises(FloatingPointError, match="leaves the range"):
        merge_tensors("della", tensors, base, per_model={"weight": [1.0], "density": [0.5], "epsilon": [0.5]})


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t: float) -> None:
    base, tensors = models(1, spread=2.0)
    expected = on_sphere(t, base.double(), tensors[0].double())
    check(merge_tensors("slerp", tensors, base, t=t), expected)
    near = base * 1.5
    check(merge_tensors("slerp", [near], base, t=t), ((1 - t) * base + t * near).double())


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("way", ["flat", "rows", "columns"])
def test_nuslerp(based: bool, way: str) -> None:
    base, tensors = models(2, spread=2.0)
    first, second = [t - base.double() if based else t for t in wide(tensors)]
    t = 0.75
    if way == "flat":
        merged = on_sphere(t, first, second)
    elif way == "rows":
        merged = torch.stack([on_sphere(t, a, b) for a, b in zip(first, second, strict=True)])
    else:
        merged = torch.stack([on_sphere(t, a, b) for a, b in zip(first.T, second.T, strict=True)]).T
    options = {"nuslerp_flatten": way == "flat", "nuslerp_row_wise": way == "columns"}
    per_model = {"weight": [1.0, 3.0]}
    found = merge_tensors("nuslerp", tensors, base if based else None, per_model=per_model, **options)
    check(found, merged + base if based else merged)


def test_multislerp_of_two_is_slerp_of_directions() -> None:
    _, tensors = models(2, spread=2.0)
    first, second = wide(tensors)
    direction = on_sphere(0.5, first / first.norm(), second / second.norm())
    expected = direction * (first.norm() + second.norm()) / 2
    check(merge_tensors("multislerp", tensors, per_model={"weight": [0.5, 0.5]}), expected)


@pytest.mark.parametrize("based", [False, True])
def test_multislerp(based: bool) -> None:
    base, tensors = models(3, spread=2.0)
    origin = base.double() if based else torch.zeros(SHAPE, dtype=torch.float64)
    vectors = torch.stack([(t - origin).flatten() for t in wide(tensors)])
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    units = vectors / vectors.norm(dim=1, keepdim=True)
    mean = weights @ units
    mean = mean / mean.norm()
    tangent = weights @ (units - (units @ mean)[:, None] * mean)
    direction = mean * tangent.norm().cos() + tangent * (tangent.norm().sin() / tangent.norm())
    expected = (direction * (weights @ vectors.norm(dim=1))).view(SHAPE) + origin
    found = merge_tensors("multislerp", tensors, base if based else None, per_model={"weight": weights.tolist()})
    check(found, expected)


def test_directions_that_cancel_out() -> None:
    _, (one,) = models(1)
    with pytest.raises(FloatingPointError, match="cancel out"):
        merge_tensors("multislerp", [one, -one, one, -one], per_model={"weight": [1.0] * 4})


def test_the_karcher_mean_has_no_tangent() -> None:
    _, tensors = models(3, spread=2.0)
    found = merge_tensors("karcher", tensors, max_iter=50, tol=1e-9).double()
    norms = [t.norm() for t in wide(tensors)]
    assert found.norm().item() == pytest.approx((sum(norms) / 3).item(), rel=1e-6)
    mean = found / found.norm()
    tangent = torch.zeros(SHAPE, dtype=torch.float64)
    for unit in (t / t.norm() for t in wide(tensors)):
        cosine = (mean * unit).sum()
        tangent += torch.acos(cosine) / torch.sin(torch.acos(cosine)) * (unit - cosine * mean)
    assert tangent.norm() < 1e-5


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, (29,)])
def test_model_stock(filter_wise: bool, shape: tuple[int, ...]) -> None:
    base, tensors = models(shape=shape)
    tensors = [tensor + 0.3 for tensor in tensors]
    rows = (lambda x: x.view(1, -1)) if not filter_wise or len(shape) == 1 else (lambda x: x)
    offsets = [rows((t - base).double()) for t in tensors]
    cosines = [(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in itertools.combinations(offsets, 2)]
    cosine = torch.stack(cosines).mean(0)[:, None]
    t = 3 * cosine / (1 + 2 * cosine)
    expected = (t * rows(sum(wide(tensors)) / 3) + (1 - t) * rows(base.double())).view(shape)
    check(merge_tensors("model_stock", tensors, base, filter_wise=filter_wise), expected)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_sce(share: float) -> None:
    base, tensors = models()
    deltas = torch.stack([(t - base).double() for t in tensors])
    if share < 1:
        variances = torch.stack([t - base for t in tensors]).var(0, unbiased=False)
        chosen = variances.flatten().argsort(descending=True)[: int(share * variances.numel())]
        mask = torch.zeros(variances.numel(), dtype=torch.float64)
        mask[chosen] = 1
        deltas = deltas * mask.view(SHAPE)
    lengths = deltas.square().mean(dim=(1, 2))
    agree = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    shares = (lengths / lengths.sum()).view(-1, 1, 1) * agree
    expected = base + (deltas * shares).sum(0) / shares.sum(0).clamp(min=1e-6)
    check(merge_tensors("sce", tensors, base, select_topk=share), expected)


def test_nearswap() -> None:
    base, (other,) = models(1)
    share = (0.1 / (base - other).double().abs()).clamp(max=1)
    check(merge_tensors("nearswap", [other], base, t=0.1), share * other + (1 - share) * base)


def test_arcee_fusion() -> None:
    base, (other,) = models(1)
    p, q = other.double().softmax(-1) + 1e-8, base.double().softmax(-1) + 1e-8
    importance = (other - base).double().abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    lowest, median, highest = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    chosen = importance >= median + 1.5 * (highest - lowest)
    assert 0 < chosen.sum() < chosen.numel()
    check(merge_tensors("arcee_fusion", [other], base), base + (other - base).double() * chosen)


def changed_alone_and_together() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Makes models that have each left some elements as they were, so that some were changed by one model alone."""
    base, tensors = models()
    generator = torch.Generator().manual_seed(8)
    return base, [torch.where(torch.rand(SHAPE, generator=generator) < 0.4, tensor, base) for tensor in tensors]


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_ram(epsilon: float) -> None:
    base, tensors = changed_alone_and_together()
    deltas = torch.stack([(t - base).double() for t in tensors])
    changed = deltas.abs() > epsilon
    counts = changed.sum(0)
    assert {0, 1, 2, 3} == set(counts.unique().tolist())
    expected = base + (deltas * changed).sum(0) / counts.clamp(min=1)
    check(merge_tensors("ram", tensors, base, epsilon=epsilon), expected)


@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 100.0), (-0.3, 2.0)])
@pytest.mark.parametrize("piece_elements", [1 << 19, 40])
def test_ramplus_tl(monkeypatch: pytest.MonkeyPatch, r: float, alpha: float, piece_elements: int) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_ELEMENTS", piece_elements)
    base, tensors = changed_alone_and_together()
    tensors[2] = torch.where((tensors[0] != base) | (tensors[1] != base), tensors[2], base)  # nothing of its own
    deltas = torch.stack([(t - base).double() for t in tensors])
    changed = deltas.abs() > 1e-5
    counts = changed.sum(0)
    expected = base.double()
    for delta, mask in zip(deltas, changed, strict=True):
        alone, shared = mask & (counts == 1), mask & (counts > 1)
        ratio = shared.sum().item() / max(alone.sum().item(), 1e-5)
        factor = 1 + r * min(max(ratio, 0), alpha)
        expected = expected + delta * alone * factor + delta * shared / counts.clamp(min=1)
    check(merge_tensors("ramplus_tl", tensors, base, r=r, alpha=alpha), expected)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram_of_models_that_changed_nothing_is_the_base(method: str) -> None:
    base, _ = models()
    assert torch.equal(merge_tensors(method, [base, base], base, epsilon=0), base)


def test_passthrough() -> None:
    _, (one,) = models(1)
    assert torch.equal(merge_tensors("passthrough", [one]), one)
    check(merge_tensors("passthrough", [one], per_model={"scale": [0.5]}), 0.5 * one.double())


Settings = tuple[int, dict[str, list[Any]], dict[str, Any]]


def settings_of(method: str) -> Settings:
    row = METHODS[method]
    count = min(max(2, row.num_models[0]), row.num_models[1])
    per_model = {"weight": [0.6, 0.4], "density": [0.5, 0.7], "gamma": [0.1] * 2, "epsilon": [0.1] * 2}
    options = {name: 0.4 for name, default in row.shared.items() if default is REQUIRED}
    if "select_topk" in row.shared:
        options["select_topk"] = 0.5
    return count, {name: per_model[name][:count] for name in row.per_model if name in per_model}, options


@pytest.mark.parametrize("method", ALONE)
def test_cuts_change_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count, per_model, options = settings_of(method)
    base, tensors = models(count, (50, 40), spread=0.5)
    based = base if METHODS[method].base is Base.REQUIRED else None
    whole = merge_tensors(method, tensors, based, per_model=per_model, **options)
    monkeypatch.setattr(pieces_module, "PIECE_ELEMENTS", 300)
    cut = merge_tensors(method, tensors, based, per_model=per_model, **options)
    random = method.startswith(("dare", "della"))
    assert random or (cut - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("method", ALONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_stay_as_they_are(method: str, dtype: torch.dtype) -> None:
    count, per_model, options = settings_of(method)
    base, tensors = models(count)
    base, tensors = base.to(dtype), [tensor.to(dtype) for tensor in tensors]
    before = [tensor.clone() for tensor in (base, *tensors)]
    based = base if METHODS[method].base is Base.REQUIRED else None
    merged = merge_tensors(method, tensors, based, per_model=per_model, **options)
    assert torch.isfinite(merged).all()
    assert all(torch.equal(now, then) for now, then in zip((base, *tensors), before, strict=True))


@pytest.mark.parametrize("method", ALONE)
def test_models_that_are_the_same_come_back(method: str) -> None:
    count, per_model, options = settings_of(method)
    base, _ = models(count)
    based = base if METHODS[method].base is Base.REQUIRED else None
    merged = merge_tensors(method, [base.clone() for _ in range(count)], based, per_model=per_model, **options)
    check(merged, base.double(), 1e-6)
