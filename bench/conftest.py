"""What every benchmark gets: fixed threads, a ceiling, `measure`, clean machine facts, a table at the end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from threadpoolctl import ThreadpoolController

from bench.measure import CPUS, OURS, Ceiling, Group, Measure, measure_ceiling
from bench.summary import lines
from dinofast.ops import providers

THREADS = int(os.environ.get("DINOFAST_BENCH_THREADS", 0)) or len(CPUS) or os.cpu_count() or 1
PACKAGES = (
    "dinofast",
    "torch",
    "numpy",
    "faiss-cpu",
    "scipy",
    "opencv-python-headless",
    "scikit-learn",
    "onnxruntime",
    "openvino",
)
VERSIONS = {p.name: p.version for p in importlib.metadata.distributions() if p.name in PACKAGES}
GROUPS = pytest.StashKey[dict[str, Group]]()
CEILING = pytest.StashKey[Ceiling]()
TICKS: deque[float] = deque()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--memory", action="store_true", help="also measure each contender's peak extra memory")
    parser.addoption("--slow", action="store_true", help="also run what takes a minute a size")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[GROUPS] = {}
    config.stash[CEILING] = Ceiling(0.0, 0.0)


def interleaved_clock() -> float:
    """Give pytest-benchmark the times that were already taken, in turns with the other contenders."""
    return TICKS.popleft()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=interleaved_clock))
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(scope="session")
def with_memory(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--memory"))


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Measure:
    """Time a group when its first contender asks, and give each contender's samples to pytest-benchmark."""

    def run(name: str, contender: str, prepare: Callable[[], Group]) -> None:
        stash = request.config.stash
        groups = stash[GROUPS]
        if name not in groups:
            _fix_threads()  # compiled code keeps the number that it finds
            group = prepare()
            _fix_threads()
            if benchmark.enabled:
                stash[CEILING] = stash[CEILING].or_better(measure_ceiling())
                group.run()
            groups[name] = group
        benchmark.group = name
        rounds = 1
        if benchmark.enabled:
            timing = groups[name].timings[contender]
            TICKS.extend(tick for sample in timing.used for tick in (0.0, sample.seconds))
            rounds = len(timing.used)
            benchmark.extra_info.update(_facts(groups[name], contender))
        benchmark.pedantic(lambda: None, rounds=rounds)

    return run


def _facts(group: Group, contender: str) -> dict[str, Any]:
    facts, timing = group.facts[contender], group.timings[contender]
    facts.update(
        contender=contender,
        instruction_set=providers.instruction_set(),
        threads=THREADS,
        versions=VERSIONS,
        disturbed=timing.disturbed,
        samples_ms=[round(1e3 * s.seconds, 5) for s in timing.samples],
        others=[round(s.others, 3) for s in timing.samples],
    )
    if timing.stages:
        facts["stages_ms"] = {stage: 1e3 * seconds for stage, seconds in timing.stages.items()}
    if "flops" in facts:
        facts["gops"] = facts["flops"] / timing.median / 1e9
    if contender.startswith(OURS) and (ratios := group.ratios(contender)):
        facts["ratio_to_peers"] = ratios
        facts["fastest_peer"], facts["ratio_to_fastest_peer"] = next(iter(ratios.items()))
    return facts


def _fix_threads() -> ThreadpoolController:
    """Give every OpenMP and BLAS pool `THREADS` threads, also those loaded since the last call."""
    torch.set_num_threads(THREADS)
    pools = ThreadpoolController()
    pools.limit(limits=THREADS)
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(THREADS)
    return pools


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Say what decides the times, and nothing that names the machine."""
    for name in ("node", "release", "python_build", "python_compiler"):
        machine_info.pop(name, None)
    kept = ("brand_raw", "arch", "bits", "count", "l2_cache_size", "l3_cache_size")
    machine_info["cpu"] = {k: v for k, v in machine_info["cpu"].items() if k in kept}
    machine_info["threads"] = THREADS
    machine_info["thread_pools"] = [
        {k: v for k, v in pool.items() if k != "filepath"} for pool in _fix_threads().info()
    ]
    machine_info["instruction_set"] = providers.instruction_set()
    machine_info["versions"] = VERSIONS
    machine_info["ceiling"] = asdict(config.stash[CEILING])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    for name in ("project", "branch", "author_time"):
        commit_info.pop(name, None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add the shares of the ceiling, which is known when the run is over."""
    ceiling = config.stash[CEILING]
    for entry in output_json["benchmarks"]:
        facts = entry["extra_info"]
        if "flops" in facts:
            seconds = entry["stats"]["median"]
            facts["share_of_ceiling"] = ceiling.share(facts["flops"], facts["bytes"], seconds)
            if ceiling.int8 and facts.get("strategy") in ("lowp", "pruned"):
                facts["share_of_int8_ceiling"] = facts["flops"] / seconds / ceiling.int8


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    timed = {name: group for name, group in config.stash[GROUPS].items() if group.timings}
    if timed:
        terminalreporter.section("benchmarks")
        for line in lines(timed, config.stash[CEILING], THREADS):
            terminalreporter.write_line(line)
        saved = config.getoption("--benchmark-json") or config.getoption("--benchmark-storage")
        terminalreporter.write_line(f"\nJSON of pytest-benchmark: {saved}")
