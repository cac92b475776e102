"""Methods of the literature as their papers write them, dense, in float64: functions from task vectors to a merge."""

from __future__ import annotations

import torch

Deltas = list[torch.Tensor]
SHAPES = [(37, 24), (24, 37), (32, 32)]


def models(count: int, shape: tuple[int, ...], spread: float = 0.1) -> tuple[torch.Tensor, Deltas]:
    """Makes a base and some models, float32."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=generator)
    return base, [base + spread * torch.randn(shape, generator=generator) for _ in range(count)]


def task_vectors(base: torch.Tensor, tensors: Deltas) -> Deltas:
    return [tensor.double() - base.double() for tensor in tensors]


def check(found: torch.Tensor, base: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Compares what a merge has added to the base; beside the tolerance, float32 may round the sum."""
    assert found.shape == base.shape and found.dtype == torch.float32
    error = (found.double() - base.double() - expected).norm()
    assert error <= tolerance * expected.norm() + 2**-24 * base.double().norm()


def polar(matrix: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def tsv_m(deltas: Deltas, alpha: float = 1.0) -> torch.Tensor:
    rank = min(deltas[0].shape) // len(deltas)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = polar(torch.cat([u[:, :rank] for u, _, _ in parts], dim=1))
    vh = polar(torch.cat([vh[:rank] for _, _, vh in parts]))
    return alpha * u @ torch.diag(torch.cat([s[:rank] for _, s, _ in parts])) @ vh


def iso_c(deltas: Deltas, scaling_factor: float = 1.0) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    return scaling_factor * s.mean() * u @ vh


def iso_cts(deltas: Deltas, scaling_factor: float = 1.0, common_space_fraction: float = 0.8) -> torch.Tensor:
    size, count = min(deltas[0].shape), len(deltas)
    own = round((size - int(size * common_space_fraction)) / count)
    common = size - own * count
    u, s, vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    us, ss, vhs = [u[:, :common]], [s[:common]], [vh[:common]]
    for delta in deltas:
        rest = (torch.eye(len(u), dtype=u.dtype) - us[0] @ us[0].T) @ delta
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        us, ss, vhs = [*us, u[:, :own]], [*ss, s[:own]], [*vhs, vh[:own]]
    return scaling_factor * torch.cat(ss).mean() * polar(torch.cat(us, dim=1)) @ polar(torch.cat(vhs))


def wudi(deltas: Deltas) -> torch.Tensor:
    sums = sum(delta.T @ delta / delta.square().sum() for delta in deltas)
    right = sum(delta @ delta.T @ delta / delta.square().sum() for delta in deltas)
    return right @ torch.linalg.pinv(sums, hermitian=True, rtol=1e-10)


def wudi_loss(merged: torch.Tensor, deltas: Deltas) -> torch.Tensor:
    return sum(((merged - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas)


def ace(deltas: Deltas, eps: float = 1e-2, k_frac: float = 0.3, tau: float = 0.3) -> torch.Tensor:
    """Merges by equations 5 to 19 of the paper."""
    logs = torch.stack([delta.square().sum().log() for delta in deltas])
    unlike = bool(logs.var() / logs.mean() ** 2 > tau)
    size = deltas[0].shape[1]
    one = torch.eye(size, dtype=torch.float64)
    centred = [delta - delta.mean(0) for delta in deltas]
    grams = [each.T @ each for each in centred]
    traces = [gram.trace() for gram in grams]
    scaled = [gram / trace for gram, trace in zip(grams, traces, strict=True)] if unlike else grams
    ridges = [eps / trace if unlike else eps for trace in traces]
    regular = [gram + ridge * one for gram, ridge in zip(scaled, ridges, strict=True)]
    prior = torch.ones(size, 1, dtype=torch.float64) @ (sum(scaled).mean(0, keepdim=True))
    if unlike:
        prior = prior / torch.stack([delta.square().sum() for delta in deltas]).mean()
    right = sum(each @ gram for each, gram in zip(centred, regular, strict=True))
    merged = right @ torch.linalg.inv(sum(regular) + prior)
    if not unlike:
        return merged
    mean = sum(regular) / len(deltas)
    fused = merged + sum(delta @ (gram - mean) for delta, gram in zip(deltas, scaled, strict=True))
    u, s, vh = torch.linalg.svd(fused, full_matrices=False)
    k = int(len(s) * k_frac)
    return merged + s[:k].mean() * u[:, :k] @ vh[:k]


def opcm(models: list[dict[str, torch.Tensor]], matrices: set[str], alpha: float = 0.5) -> dict[str, torch.Tensor]:
    """Merges step by step, with the factor of every step, over the task vectors of whole models."""

    def norm(of: dict[str, torch.Tensor]) -> float:
        return sum(float(tensor.square().sum()) for tensor in of.values()) ** 0.5

    merged, last, norms = dict(models[0]), 1.0, [norm(models[0])]
    for model in models[1:]:
        norms.append(norm(model))
        raw = {}
        for name, before in merged.items():
            cleaned = projected(model[name], before, alpha) if name in matrices else model[name]
            raw[name] = last * before + cleaned
        last = norm(raw) / (sum(norms) / len(norms))
        merged = {name: tensor / last for name, tensor in raw.items()}
    return merged


def projected(delta: torch.Tensor, merged: torch.Tensor, alpha: float) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(merged, full_matrices=True)
    split = int(((s.cumsum(0) / s.sum()) > alpha).double().argmax())
    core = u.T @ delta @ vh.T
    core.diagonal().zero_()
    core[:split, :split] = 0
    return u @ core @ vh


def consensus_ta(deltas: Deltas, limit: float, votes: int) -> torch.Tensor:
    total = sum(deltas)
    masks = sum((delta.abs() > limit * (total - delta).abs()).double() for delta in deltas)
    return total * (masks >= votes)


# Steps after a merge: functions from a merged task vector, and the candidates'


def svc(merged: torch.Tensor, deltas: Deltas, alpha: float | None = None) -> torch.Tensor:
    """Calibrates direction by direction, as the paper writes it."""
    alpha = 1 / len(deltas) if alpha is None else alpha
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    calibrated = torch.zeros_like(merged)
    for r in range(len(s)):
        own = u[:, r] @ merged
        shares = []
        for delta in deltas:
            response = u[:, r] @ delta
            shares.append(float(own @ response / response.square().sum()))
        calibrated += s[r] * len(deltas) / sum(max(alpha, share) for share in shares) * torch.outer(u[:, r], vh[r])
    return calibrated


def subspace_boosting(merged: torch.Tensor, beta: float = 0.01) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    cumulated, first = 0.0, len(s) - 1
    for number, value in enumerate(s.tolist()):
        cumulated += value
        if cumulated >= beta * s.sum().item() * (1 - 1e-12):
            first = number
            break
    return u @ torch.diag(torch.maximum(s, s[first])) @ vh


def rescale(merged: torch.Tensor, deltas: Deltas, factor: float = 1.0) -> torch.Tensor:
    return factor * merged * sum(delta.norm() for delta in deltas) / len(deltas) / merged.norm()
