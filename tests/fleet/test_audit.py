"""Fleets: discovery, rows, families, duplicates, broken adapters, the cache, shards and executors."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit import fleet
from lorakit.adapters.adapter import AdapterModule
from lorakit.errors import AdapterFileError, PlanError
from lorakit.fleet import _cache
from lorakit.fleet._families import modified_z_scores
from lorakit.fleet._find import find_adapters


@pytest.fixture
def home(tmp_path, factors, write):
    """Five adapters: three of one family, one of another rank, one in a child of a child."""
    for seed in range(3):
        write(tmp_path / "fleet" / f"a{seed}", factors(seed))
    write(tmp_path / "fleet" / "b", factors(3, rank=2))
    write(tmp_path / "fleet" / "runs" / "c", factors(4))
    return tmp_path / "fleet"


def _names(report, home):
    return [os.path.relpath(row.path, home) for row in report.adapters]


def test_rows(home, factors):
    report = fleet.audit(home)
    assert _names(report, home) == ["a0", "a1", "a2", "b"]
    row = report.adapters[0]
    norm = np.sqrt(sum(np.linalg.norm(B.float() @ A.float()) ** 2 for B, A in factors(0).values()))
    assert row.frobenius_norm == pytest.approx(norm, rel=1e-5)
    assert row.size_bytes == sum(path.stat().st_size for path in (home / "a0").iterdir())
    assert (row.base_model, row.ranks, row.modules, row.dtypes) == ("base", (4, 4), 6, ("float32",))
    assert not report.has_errors
    assert [len(rows) for rows in report.families.values()] == [3, 1]
    assert not report.duplicates
    assert _names(fleet.audit(home, recursive=True), home) == ["a0", "a1", "a2", "b", "runs/c"]


def test_waste_is_what_a_cut_at_99_percent_saves(tmp_path, write):
    B, A = torch.eye(8, 4), torch.eye(4, 16) * torch.tensor([[1.0], [1.0], [0.01], [0.01]])
    write(tmp_path / "x", {"m.q_proj": (B, A), "m.v_proj": (torch.zeros(8, 4), A)})
    [row] = fleet.audit([tmp_path / "x"]).adapters
    entries = 24  # of each of the 4 ranks: q_proj keeps 2 of them, v_proj, whose update is zero, 1
    assert row.waste_bytes == 4 * entries * (2 + 3)
    assert row.waste_share == pytest.approx(5 / 8)
    assert [finding.code for finding in row.findings] == ["untrained"]


def test_servers_that_would_be_wrong(tmp_path, factors, write):
    write(tmp_path / "x", factors(0), alpha_pattern={"q_proj": 32})
    [row] = fleet.audit([tmp_path / "x"]).adapters
    assert {"sglang", "vllm-0.28"} <= set(row.served_wrong)
    assert "vllm" not in row.served_wrong
    assert "served_wrong" in [finding.code for finding in row.findings]


def test_discovery_visits_each_directory_once_and_no_hidden_one(home, factors, write):
    write(home / ".hidden" / "x", factors(5))
    (home / "loop").symlink_to(home, target_is_directory=True)
    (home / "itself").symlink_to(home / "itself")
    (home / "z-again").symlink_to(home / "a0", target_is_directory=True)
    outside = write(home.parent / "outside", factors(6))
    (home / "linked").symlink_to(outside, target_is_directory=True)
    write(home / "a0" / "nested", factors(7))
    found = [os.path.relpath(path, home) for path, _ in find_adapters(str(home), recursive=True)]
    assert found == ["a0", "a0/nested", "a1", "a2", "b", "linked", "runs/c"]


def test_a_directory_that_cannot_be_listed_is_a_row(home, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("runs"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = fleet.audit(home, recursive=True)
    assert [row.error_type for row in report.adapters] == [None] * 4 + ["PermissionError"]
    assert report.has_errors


def _broken(home):
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    for name in ("k-cut", "k-json", "k-no-config", "k-no-weights", "k-type"):
        shutil.copytree(home / "a0", home / name)
    data = (home / "k-cut" / weights).read_bytes()
    (home / "k-cut" / weights).write_bytes(data[:-100])
    (home / "k-json" / config).write_text("{")
    (home / "k-no-config" / config).unlink()
    (home / "k-no-weights" / weights).unlink()
    (home / "k-type" / config).write_text('{"peft_type": "IA3"}')
    (home / "k-dangling").mkdir()
    (home / "k-dangling" / weights).symlink_to(home / "nothing")
    (home / "k-dangling" / config).write_text("{}")
    (home / "k-pickle").mkdir()
    shutil.copy(home / "a0" / config, home / "k-pickle")
    (home / "k-pickle" / "adapter_model.bin").write_bytes(b"no pickle")


def test_a_broken_adapter_is_a_row_and_never_the_end(home, tmp_path):
    whole = fleet.audit(home).adapters
    _broken(home)
    report = fleet.audit(home, cache=tmp_path / "cache")
    types = {os.path.basename(row.path): row.error_type for row in report.broken}
    assert types == {
        "k-cut": "AdapterFileError",
        "k-dangling": "UnsupportedModelError",
        "k-json": "AdapterFileError",
        "k-no-config": "AdapterFileError",
        "k-no-weights": "AdapterFileError",
        "k-pickle": "AdapterFileError",
        "k-type": "UnsupportedModelError",
    }
    assert [row for row in report.adapters if not row.broken] == list(whole)
    assert report.has_errors
    assert "7 cannot be read" in report.headline
    messages = {os.path.basename(row.path): row.error for row in report.broken}
    assert "is not a whole safetensors file" in messages["k-cut"]
    assert "IA3" in messages["k-type"]
    assert fleet.audit(home, cache=tmp_path / "cache").to_dict() == report.to_dict()


def test_non_finite_entries_are_one_finding_with_a_count(tmp_path, factors, write):
    made = {name: (B * float("nan"), A) for name, (B, A) in factors(0).items()}
    write(tmp_path / "x", made)
    report = fleet.audit([tmp_path / "x"])
    assert [(each.severity, each.code, each.count) for each in report.adapters[0].findings] == [
        ("error", "non_finite", 6)
    ]
    assert report.has_errors
    json.dumps(report.to_dict(), allow_nan=False)


def _gauged(factors, seed, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (B, A) in factors.items():
        G = torch.randn((len(A), len(A)), generator=generator, dtype=torch.float64) + 3 * torch.eye(len(A))
        extra = noise * torch.randn(B.shape, generator=generator, dtype=torch.float64)
        found[name] = ((B + extra) @ G, torch.linalg.solve(G, A))
    return found


def _kinds(report):
    return {
        os.path.basename(each.path): (os.path.basename(group.path), each.kind)
        for group in report.duplicates
        for each in group.duplicates
    }


def test_duplicates_of_each_kind(home, factors, write):
    shutil.copytree(home / "a0", home / "d-copy")
    write(home / "d-gauge", _gauged(factors(0), 1))
    write(home / "d-bfloat16", _gauged(factors(0), 2), torch.bfloat16)
    permuted = {name: (B[:, [2, 0, 3, 1]], A[[2, 0, 3, 1]]) for name, (B, A) in factors(1).items()}
    write(home / "d-permuted", permuted)
    padded = {name: (torch.cat([B, B * 0], 1), torch.cat([A, A], 0)) for name, (B, A) in factors(1).items()}
    write(home / "d-padded", padded)
    write(home / "d-near", _gauged(factors(2), 3, noise=0.05))
    write(home / "d-scaled", factors(2), lora_alpha=12)
    report = fleet.audit(home)
    assert _kinds(report) == {
        "d-copy": ("a0", "same_files"),
        "d-gauge": ("a0", "same_update"),
        "d-bfloat16": ("a0", "same_update"),
        "d-permuted": ("a1", "same_update"),
        "d-padded": ("a1", "same_update"),
        "d-near": ("a2", "near"),
        "d-scaled": ("a2", "near"),
    }
    scaled = next(each for group in report.duplicates for each in group.duplicates if each.path.endswith("scaled"))
    assert scaled.norm_ratio == pytest.approx(3)
    assert {os.path.basename(row.duplicate_of) for row in report.adapters if row.duplicate_of} == {"a0", "a1", "a2"}
    sizes = {os.path.basename(row.path): row.size_bytes for row in report.adapters}
    copied = ("d-copy", "d-gauge", "d-bfloat16", "d-permuted", "d-padded")
    assert report.copied_bytes == sum(sizes[name] for name in copied)


def test_near_is_the_exact_cosine(home, factors, write):
    noisy = _gauged(factors(2), 3, noise=0.2)
    write(home / "d", noisy)
    a, b = (torch.cat([(B @ A).flatten() for B, A in made.values()]) for made in (factors(2), noisy))
    cosine = float(torch.cosine_similarity(a, b, dim=0))
    [group] = fleet.audit(home, near=cosine - 1e-4).duplicates
    assert group.duplicates[0].cosine == pytest.approx(cosine, abs=1e-5)
    assert not fleet.audit(home, near=cosine + 1e-4).duplicates


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
@pytest.mark.slow
def test_different_adapters_are_no_duplicates(tmp_path_factory, factors, write, seed):
    home = tmp_path_factory.mktemp("different")
    for i in range(6):
        write(home / f"{i}", factors(seed + i, rank=1 + i % 2, layers=1))
    assert not fleet.audit(home, near=0.9).duplicates


@pytest.fixture
def reads(monkeypatch):
    """Counts the factors that are read, and the files that are hashed."""
    counts = {"factors": 0, "hashes": 0}
    read, hashed = AdapterModule.read, _cache.Files.sha256

    def counting_read(self, reader):
        counts["factors"] += 1
        return read(self, reader)

    def counting_hash(self):
        counts["hashes"] += 1
        return hashed(self)

    monkeypatch.setattr(AdapterModule, "read", counting_read)
    monkeypatch.setattr(_cache.Files, "sha256", counting_hash)
    return counts


def test_a_second_run_reads_no_tensor_and_hashes_no_file(home, tmp_path, factors, write, reads):
    write(home / "d-gauge", _gauged(factors(0), 1))
    cache = tmp_path / "cache"
    plain = fleet.audit(home)
    assert fleet.audit(home, cache=cache) == plain
    reads.update(factors=0, hashes=0)
    assert fleet.audit(home, cache=cache) == plain
    assert reads == {"factors": 0, "hashes": 0}

    shutil.move(home / "a0", home / "a0-moved")  # other paths, the same content
    moved = fleet.audit(home, cache=cache)
    assert (reads["factors"], reads["hashes"]) == (0, 1)
    assert [row.sha256 for row in moved.adapters] == [row.sha256 for row in plain.adapters]

    shutil.rmtree(home / "a1")
    write(home / "a1", factors(77))
    changed = fleet.audit(home, cache=cache)
    assert reads["factors"] == 12  # audited and sketched
    assert changed.adapters[1].frobenius_norm != plain.adapters[1].frobenius_norm


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1, "lorakit": "0", "record": {}}'])
def test_damaged_and_foreign_records_are_made_anew(home, tmp_path, content):
    cache = tmp_path / "cache"
    plain = fleet.audit(home, cache=cache)
    for path in cache.rglob("*.json"):
        path.write_text(content)
    assert fleet.audit(home, cache=cache) == plain
    assert all(json.loads(path.read_text())["record"] for path in cache.rglob("*.json"))


def test_shards_together_are_the_whole(home, tmp_path, reads):
    cache = tmp_path / "cache"
    whole = fleet.audit(home, recursive=True)

    def measured(report):
        blank = {"family": None, "percentiles": {}, "unusual": (), "duplicate_of": None}
        return [replace(row, **blank) for row in report.adapters]

    parts = [fleet.audit(home, recursive=True, shard=f"{i}/3", cache=cache) for i in (1, 2, 3)]
    assert [len(part.adapters) for part in parts] == [2, 2, 1]
    assert sorted((row for part in parts for row in measured(part)), key=lambda row: row.path) == measured(whole)
    assert "shard 2/3" in parts[1].title
    reads.update(factors=0)
    assert fleet.audit(home, recursive=True, cache=cache) == whole
    assert reads["factors"] == 0


def test_executors_give_the_same(home, tmp_path):
    _broken(home)
    with ThreadPoolExecutor(2) as executor:
        assert fleet.audit(home, executor=executor, chunk=2) == fleet.audit(home)


@pytest.mark.slow
def test_two_workers_of_ray_give_the_same(home, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token to the home directory
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lorakit[ray]'")
    from lorakit.experiments import RayExecutor

    _broken(home)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in Ray's workers
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with RayExecutor() as executor:
            there = fleet.audit(home, recursive=True, executor=executor, chunk=2, cache=tmp_path / "cache")
        assert there == fleet.audit(home, recursive=True)
    finally:
        ray.shutdown()
        torch.set_num_threads(threads)


def test_what_is_unusual_stands_out(tmp_path, factors, write):
    for seed in range(9):
        write(tmp_path / f"{seed}", factors(seed))
    write(tmp_path / "large", {name: (100 * B, A) for name, (B, A) in factors(9).items()})
    report = fleet.audit(tmp_path)
    unusual = {os.path.basename(row.path): row.unusual for row in report.unusual}
    assert unusual["large"] == ("frobenius_norm",)
    assert not any("frobenius_norm" in what for name, what in unusual.items() if name != "large")
    percentiles = [row.percentiles["frobenius_norm"] for row in report.adapters]
    assert percentiles[-1] == 95  # above nine of ten, and half of itself
    assert sorted(percentiles) == [5 + 10 * i for i in range(10)]
    assert "large" in next(table for table in report.tables() if table.title.startswith("Unusual")).text()


def test_modified_z_scores():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert modified_z_scores(values) == pytest.approx([0.6745 * (value - 3) / 1 for value in values])
    same = [1.0] * 9 + [2.0]
    assert modified_z_scores(same)[-1] == pytest.approx(1 / (1.253314 * 0.1))
    assert modified_z_scores([5.0] * 4) == [0.0] * 4


def test_bad_arguments(home, tmp_path):
    with pytest.raises(AdapterFileError, match="`adapters` must be a directory, or a list"):
        fleet.audit(tmp_path / "nothing")
    with pytest.raises(AdapterFileError, match="got an empty list"):
        fleet.audit([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="There is no adapter in .* Look further below with `recursive`"):
        fleet.audit(tmp_path / "empty")
    with pytest.raises(PlanError, match="`shard` must be"):
        fleet.audit(home, shard="4/3")
    with pytest.raises(ValueError, match=r"`near` must be a number in \[0.9, 1\]; got 0.5"):
        fleet.audit(home, near=0.5)
    with pytest.raises(ValueError, match="`chunk` must be a positive integer; got 0"):
        fleet.audit(home, chunk=0)


def test_a_list_may_hold_files_and_names_that_are_nothing(home):
    files = [home / "a0" / "adapter_model.safetensors", home / "a1", "no/such", "neither this"]
    report = fleet.audit(files)
    assert [row.error_type for row in report.adapters] == [None, None, "AdapterFileError", "AdapterFileError"]
    assert report.adapters[0].frobenius_norm == fleet.audit(home).adapters[0].frobenius_norm
    assert "could not be downloaded" in report.adapters[2].error
    assert "not a Hub id" in report.adapters[3].error
    assert asdict(report)["directory"] is None
