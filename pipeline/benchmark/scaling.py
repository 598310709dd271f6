"""Weak scaling: how near the rate of n workers comes to n times that of one, where the rest goes, what Ray costs.

python -m jobs.benchmark scaling --config demo
python -m jobs.benchmark scaling --config demo --workers 1,2 --updates 600 --rounds 3 --ray
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.benchmark.arguments import count, counts
from pipeline.benchmark.pace import Pace, Stretch, measure_pace
from pipeline.benchmark.report import aligned, busy, machine
from pipeline.benchmark.step import add_config, check_folder, device_name
from pipeline.benchmark.team import cores_for, pin, run_team
from pipeline.benchmark.updates import Case
from pipeline.config import Config, ConfigError, load_config
from pipeline.training.world import World

TOGETHER, APART, ON_RAY = "together", "apart", "on Ray"
MEANING = {
    TOGETHER: "plain processes that sum their gradients",
    APART: "as many processes at the same time that sum nothing: what the machine itself takes",
    ON_RAY: "the same work in Ray Train's workers, with one report at the end of each stretch",
}


@dataclass(frozen=True)
class Run:
    """One team's stretch."""

    workers: int
    kind: str
    paces: list[Pace]

    @property
    def seconds(self) -> float:
        """Of one update: the slowest worker's."""
        return max(pace.seconds for pace in self.paces)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jobs.benchmark scaling`."""
    add_config(parser)
    add = parser.add_argument
    add("--workers", type=counts, default=[1, 2], help="numbers of workers; the first is compared with (1,2)")
    add("--threads-per-worker", type=count, default=1, help="and as many cores of its own (%(default)s)")
    add("--pictures", type=count, help="of each worker (default: train.batch_size over the config's workers)")
    add("--updates", type=count, default=64, help="measured in each round; whole intervals of R1 (%(default)s)")
    add("--rounds", type=count, default=3, help="repetitions of everything, in turn (%(default)s)")
    add("--ray", action="store_true", help="each also under Ray Train")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")


def run(args: argparse.Namespace) -> None:
    """Measures every team in every round, in turn, and prints the tables. Raises ConfigError."""
    check_folder(args.json)
    config = load_config(args.config, args.overrides)
    stretch = Stretch(
        Case(config.model, config.train, config.run.seed, args.updates),
        pictures_of(config, args.pictures),
    )
    check_interval(config, args.updates)
    about, cores = machine(), len(os.sched_getaffinity(0))
    check_gpus(max(args.workers))
    plan = [(workers, kind) for workers in args.workers for kind in kinds(workers, args.ray)]
    rounds: list[list[Run]] = []
    with tqdm(total=args.rounds * len(plan), desc="benchmark", unit=" runs", disable=None) as bar:
        for _ in range(args.rounds):
            rounds.append([])
            for workers, kind in plan:
                bar.set_postfix_str(f"{workers} {kind}")
                rounds[-1].append(measure(workers, kind, stretch, config, args.threads_per_worker))
                bar.update()
    print(
        f"\n{config.run.name}: {stretch.pictures} pictures of {config.model.size}x{config.model.size} for each worker\n"
        f"{about['cpu']}, {cores} cores, {device_name()}; {args.threads_per_worker} thread(s) for each worker; median "
        f"of {args.rounds} round(s) of {args.updates} updates"
    )
    for line in conclusions(rounds, stretch.pictures, args.workers[0]):
        print(line)
    if max(args.workers) * args.threads_per_worker > cores and not torch.cuda.is_available():
        print(f"{max(args.workers)} workers have {cores} cores between them: they wait for each other's")
    print(busy(about), end="")
    if args.json:
        content = {
            "machine": about | {"device": device_name(), "threads_per_worker": args.threads_per_worker},
            "config": config.model_dump(mode="json"),
            "pictures": stretch.pictures,
            "updates": args.updates,
            "rounds": [[dataclasses.asdict(one) for one in runs] for runs in rounds],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {args.json}")


def measure(workers: int, kind: str, stretch: Stretch, config: Config, threads: int) -> Run:
    """One team's stretch, of one kind."""
    if kind == ON_RAY:
        from pipeline.cluster.scaling import run_on_ray
        from pipeline.cluster.session import is_local

        work = pinned_pace if is_local(config.cluster) else measure_pace
        paces: list[Pace] = run_on_ray(work, stretch, config.cluster, workers, threads)
        return Run(workers, kind, paces)
    return Run(workers, kind, run_team(measure_pace, stretch, size=workers, threads=threads, apart=kind == APART))


def pinned_pace(stretch: Stretch, world: World, device: torch.device, report: Callable[[], None]) -> Pace:
    """The pace of one of Ray's workers on this machine, on cores of its own as `run_team` gives them."""
    threads = torch.get_num_threads()
    pin(cores_for(sorted(os.sched_getaffinity(0)), world.size, threads)[world.rank], threads)
    return measure_pace(stretch, world, device, report)


def kinds(workers: int, ray: bool) -> Iterator[str]:
    """What is measured with so many workers. Alone, nobody sums anything."""
    if workers > 1:
        yield APART
    yield TOGETHER
    if ray:
        yield ON_RAY


def conclusions(rounds: Sequence[Sequence[Run]], pictures: int, base: int) -> Iterator[str]:
    """The lines of the report. Ratios are taken within each round; their medians are told."""
    head = ["workers", "kind", "images/s", "ms an update", f"of {base}'s rate", "CPU ms", "waiting ms", "sums alone ms"]
    rows = []
    for number, one in enumerate(rounds[0]):
        runs = [each[number] for each in rounds]
        seconds = statistics.median(each.seconds for each in runs)
        cpu = [statistics.mean(pace.cpu for pace in each.paces) for each in runs]
        waits = [statistics.mean(pace.waiting for pace in each.paces) for each in runs]
        transfers = [statistics.mean(pace.transfer for pace in each.paces) for each in runs]
        alone = one.workers == 1 or one.kind == APART
        rows.append(
            [
                str(one.workers),
                one.kind,
                f"{one.workers * pictures / seconds:.2f}",
                f"{1e3 * seconds:.1f}",
                f"{statistics.median(efficiency(each, number, base) for each in rounds):.1%}",
                f"{1e3 * statistics.median(cpu):.1f}",
                "" if alone else f"{1e3 * statistics.median(waits):.1f}",
                "" if alone else f"{1e3 * statistics.median(transfers):.1f}",
            ]
        )
    yield aligned(head, rows)
    yield ""
    for workers in dict.fromkeys(one.workers for one in rounds[0]):
        found = [cost for cost in (ray_cost(each, workers) for each in rounds) if cost is not None]
        if found:
            spread = f"{min(found):+.1%} to {max(found):+.1%}"
            yield f"Ray costs {statistics.median(found):.1%} of the rate of {workers} worker(s) (rounds: {spread})"
    present = {one.kind for one in rounds[0]}
    yield "  CPU: processor time of a worker's update, all its threads; other work on the machine changes it little"
    for kind, text in MEANING.items():
        if kind in present:
            yield f"  {kind}: {text}"
    if TOGETHER in present and max(one.workers for one in rounds[0]) > 1:
        yield "  waiting: from a worker's own last gradient to the last sum, in all backwards and for the mean style"
        yield "  sums alone: the same bytes, all workers beginning together and nobody computing"


def efficiency(runs: Sequence[Run], number: int, base: int) -> float:
    """A team's rate over as many times that of one of the smallest plain team, in one round."""
    reference = next(one for one in runs if one.workers == base and one.kind == TOGETHER)
    return reference.seconds / runs[number].seconds


def ray_cost(runs: Sequence[Run], workers: int) -> float | None:
    """The part of the rate that is lost under Ray, in one round; None where it was not measured."""
    found = {one.kind: one.seconds for one in runs if one.workers == workers}
    return 1 - found[TOGETHER] / found[ON_RAY] if ON_RAY in found else None


def pictures_of(config: Config, asked: int | None) -> int:
    """How many pictures each worker has. Raises ConfigError unless they are whole minibatch-stddev groups."""
    group = config.model.discriminator.group
    found = asked or max(group, config.train.batch_size // config.workers // group * group)
    if found % group:
        raise ConfigError(f"--pictures is {found}: expected a multiple of model.discriminator.group ({group})")
    return found


def check_interval(config: Config, updates: int) -> None:
    """R1 must not come more often in a stretch than in training."""
    interval = config.train.r1_interval
    if config.train.r1_gamma > 0 and updates % interval:
        raise ConfigError(
            f"--updates is {updates}: expected a multiple of train.r1_interval ({interval}), for example "
            f"{-(-updates // interval) * interval}"
        )


def check_gpus(workers: int) -> None:
    """Each worker has a GPU of its own where there are any."""
    there = torch.cuda.device_count()
    if there and workers > there:
        raise ConfigError(f"--workers names {workers}, and there are {there} GPUs: one for each is needed")
