"""`detector-benchmark`: how fast it is, as ratios to what it is compared with in the same run."""

from __future__ import annotations

import argparse
from pathlib import Path

from detector.cli.common import run_command

SUBJECTS = ("train", "infer", "assign", "load", "evaluate", "augment", "share", "two_stage")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description="Time what matters against the bare network, torchvision, the dense assigners, bare image decoding,"
        " pycocotools and albumentations, in turns within one run.",
        epilog="Leave the machine alone while it runs.  A missed target is reported; the exit code stays 0.",
    )
    parser.add_argument("subjects", nargs="*", metavar="|".join((*SUBJECTS, "all")), help="default: all")
    parser.add_argument(
        "--quick", action="store_true", help="small inputs and few turns: whether it runs, not how fast"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda, cuda:1 ... of train, infer, assign, share, two_stage (default: cpu)"
    )
    parser.add_argument("--rules", metavar="NAME,NAME", help="of assign, as its table calls them (default: all)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here, every turn's time included")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables into this document")
    options = parser.parse_intermixed_args(arguments)
    unknown = [name for name in options.subjects if name not in (*SUBJECTS, "all")]
    if unknown:
        parser.error(f"{unknown[0]!r}: expected one or several of {', '.join(SUBJECTS)}, or all")
    if options.threads is not None and options.threads < 1:
        parser.error("--threads: expected at least 1")
    if options.rules is not None and options.markdown is not None:
        parser.error("--markdown: its section holds all rules; leave --rules away")
    if options.quick and options.markdown is not None:
        parser.error("--markdown: the times of a --quick run say nothing")
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    import json
    import os
    from dataclasses import replace
    from functools import partial

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or else the profiler, which counts memory, writes to stderr
    import torch

    from detector.bench import assignment, augmentation, inference, loading, scoring, step_share, train_step, two_stage
    from detector.bench.document import update
    from detector.bench.measure import machine
    from detector.errors import ConfigError
    from detector.files import write_whole
    from detector.train.device import find_device

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    subjects = (train_step, inference, assignment, loading, scoring, augmentation, step_share, two_stage)
    rules = tuple(name.strip() for name in (options.rules or "").split(",") if name.strip())
    if wrong := [name for name in rules if name not in assignment.rule_names()]:
        raise ConfigError(f"--rules: {wrong[0]!r}: expected some of {', '.join(assignment.rule_names())}")
    runs = dict(zip(SUBJECTS, (t.run for t in subjects), strict=True))
    runs["assign"] = partial(assignment.run, rules=rules)
    chosen = [
        name for name in SUBJECTS if name in options.subjects or not options.subjects or "all" in options.subjects
    ]
    tables = {}
    for name in chosen:
        table = runs[name](device, options.quick)
        tables[name] = replace(table, targets=[]) if options.quick else table
        print(tables[name].markdown(machine(device)), flush=True)
    if options.json is not None:
        content = {"machine": machine(device), "quick": options.quick}
        content |= {name: table.as_json() for name, table in tables.items()}
        write_whole(options.json, (json.dumps(content, indent=1) + "\n").encode())
    if options.markdown is not None:
        old = options.markdown.read_text(encoding="utf-8") if options.markdown.is_file() else ""
        new = update(old, {table.title: table.markdown(machine(device)) for table in tables.values()})
        write_whole(options.markdown, new.encode())
    return 0
