"""Several machines through Ray: which of them can work on cells, and a cell on one of them.

Where a machine has the study's folder too (a shared file system), a cell is worked on in place.  Where it has not, the
cell's files travel: there when it starts, back while it runs and when it ends.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from detector.config.run import RunConfig
from detector.errors import UserError
from detector.files import write_whole
from detector.lab import node
from detector.lab.grid import Cell
from detector.lab.process import Ended
from detector.lab.run import prepare
from detector.lab.standing import task_of
from detector.lab.study import StudyConfig

INSTALL = "--ray needs Ray, which is not installed here: pip install ray"
ADDRESS = r"^(auto|(\[[0-9a-fA-F:]+\]|[\w.-]+):\d+)$"
NODES_EVERY = 2.0  # seconds between two looks at which machines there are
MIRROR_EVERY = 60.0  # seconds after which a cell's new files are fetched, so that a lost machine loses no more
Paths = tuple[tuple[str, str], ...]


@contextmanager
def connected(
    study: StudyConfig,
    cells: Sequence[Cell],
    out: Path,
    address: str,
    say: Callable[[str], None],
    jobs: int | None = None,
) -> Iterator[Cluster]:
    """The machines of the Ray cluster at `address` (HOST:PORT of its head; `auto`: the one this machine is part of).

    `jobs`: at most so many cells at a time.  Every machine is looked at before anything runs.

    Raises:
        UserError: there is no Ray or no such cluster; or a machine has other versions, lacks data, or none can work.
    """
    if not re.match(ADDRESS, address):
        raise UserError(f"--ray: {address!r} is no address: expected HOST:PORT; to leave it out, put --ray last")
    ray = _ray()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"--ray {address}: no Ray cluster could be joined ({str(error).strip().splitlines()[0]}). Start it with"
            " `ray start --head` here and `ray start --address=HOST:6379` on the other machines"
        ) from None
    token = out / f"shared-{uuid4().hex}"
    try:
        write_whole(token, b"")
        cluster = Cluster(ray, study, token, say, jobs)
        cluster.check(cells)
        yield cluster
    finally:
        ray.shutdown()
        with suppress(OSError):
            token.unlink()


class Cluster:
    """A place for cells (`run.Place`)."""

    def __init__(
        self, ray: ModuleType, study: StudyConfig, token: Path, say: Callable[[str], None], jobs: int | None
    ) -> None:
        self.ray, self.study, self.token, self.say, self.jobs = ray, study, str(token), say, jobs
        self.versions = node.versions()
        self._gpus = False
        self._room, self._looked = 0, -NODES_EVERY

    def check(self, cells: Sequence[Cell]) -> None:
        """Looks at every machine that would be given cells.

        Raises:
            UserError: one line for each thing that is wrong, or no machine is large enough.
        """
        ray = self.ray
        wants_gpu = any(cell.config.train.device != "cpu" for cell in cells)
        self._gpus = wants_gpu and any(n["Resources"].get("GPU", 0) >= 1 for n in self._nodes())
        paths = tuple(dict.fromkeys(pair for cell in cells for pair in needed(cell.config, self.study.split)))
        fit = [n for n in self._nodes() if self._cells_on(n)]
        if not fit:
            has = ", ".join(f"{n['NodeManagerAddress']}: {n['Resources'].get('CPU', 0):g} CPUs" for n in self._nodes())
            raise UserError(f"--ray: no machine of the cluster can take a cell of {self.study.threads} threads ({has})")
        look = ray.remote(_look())
        looks = [look.options(num_cpus=0, scheduling_strategy=_on(n["NodeID"])).remote(self.token, paths) for n in fit]
        wrong, shared = [], 0
        for where, answer in zip((n["NodeManagerAddress"] for n in fit), looks, strict=True):
            try:
                found = ray.get(answer)
            except ray.exceptions.RayError as error:
                wrong.append(f"--ray: {where} could not be looked at: {str(error).strip().splitlines()[-1]}")
                continue
            if isinstance(found, str):
                wrong.append(f"--ray: {where} has no such detector ({found}): install the same there as here")
                continue
            wrong += self.objections(found)
            shared += found.shares
        if wrong:
            raise UserError("\n".join(dict.fromkeys(wrong)))
        what = "all share the study's folder" if shared == len(fit) else f"{shared} share the study's folder"
        self.say(f"Ray: {len(fit)} machines, {what}")

    def objections(self, machine: node.Machine) -> list[str]:
        """Why a machine must not be given a cell."""
        wrong = [
            f"--ray: {machine.name}: {name} is {machine.versions.get(name)}, here it is {here}: results could differ;"
            " install the same there"
            for name, here in self.versions.items()
            if machine.versions.get(name) != here
        ]
        return wrong + [
            f"--ray: {machine.name}: {key}: {path}: not there; put it at the same path on every machine"
            for key, path in machine.missing
        ]

    def room(self) -> int:
        if time.monotonic() - self._looked >= NODES_EVERY:
            before, self._room = self._room, sum(self._cells_on(n) for n in self._nodes())
            self._looked = time.monotonic()
            if before and not self._room:
                self.say("Ray: no machine is left; waiting for one (Ctrl-C stops the study, the next call goes on)")
        return self._room if self.jobs is None else min(self._room, self.jobs)

    def start(self, cell: Cell, slot: int) -> OnNode:
        prepare(cell, task_of(self.study))
        return OnNode(self, cell)

    def actor(self) -> Any:
        kind = self.ray.remote(node.CellOnNode)
        cpus, gpus = (0, 1) if self._gpus else (self.study.threads, 0)
        return kind.options(num_cpus=cpus, num_gpus=gpus, max_concurrency=4, max_restarts=0).remote()

    def _nodes(self) -> list[dict[str, Any]]:
        return [n for n in self.ray.nodes() if n["Alive"]]

    def _cells_on(self, one: dict[str, Any]) -> int:
        if self._gpus:
            return int(one["Resources"].get("GPU", 0))
        return int(one["Resources"].get("CPU", 0) // self.study.threads)


class OnNode:
    """A cell on a machine (`run.Work`): a place is found, the machine is looked at, the cell runs."""

    def __init__(self, cluster: Cluster, cell: Cell) -> None:
        self._cluster, self._cell = cluster, cell
        self._actor = cluster.actor()
        self._looking = self._actor.look.remote(cluster.token, needed(cell.config, cluster.study.split))
        self._running: Any = None
        self._mirror: Any = None
        self._mirrored = time.monotonic()
        self._asked = self._done = False
        self._ended: Ended | None = None

    def ask_to_stop(self) -> None:
        if self._asked:
            return
        self._asked = True
        if self._running is None:
            self._end(Ended(None, ()))
        else:
            self._actor.stop.remote()

    def done(self) -> bool:
        if not self._done:
            try:
                self._look_again()
            except UserError as error:
                self._end(Ended(None, (f"error: {error}",)))
            except self._cluster.ray.exceptions.RayTaskError as error:
                self._end(Ended(None, (f"error: {str(error).strip().splitlines()[-1]}",)))
            except self._cluster.ray.exceptions.RayError:  # the actor died, its machine, or what it had said
                self._end(None)
        return self._done

    def ended(self) -> Ended | None:
        return self._ended

    def _look_again(self) -> None:
        ray, folder = self._cluster.ray, self._cell.folder
        if self._running is None:
            if not self._ready(self._looking):
                return
            machine: node.Machine = ray.get(self._looking)
            wrong = self._cluster.objections(machine)
            if wrong:
                raise UserError("; ".join(wrong))
            files = None if machine.shares else node.content(folder, list(node.stamps(folder)))
            self._running = self._actor.run.remote(str(folder), str(Path.cwd()), self._cluster.study.threads, files)
            self._cluster.say(f"{self._cell.name}: on {machine.name}")
            return
        over = self._ready(self._running)
        if self._mirror is not None and (over or self._ready(self._mirror)):
            node.put(folder, ray.get(self._mirror))
            self._mirror = None
        if over:
            ended, files = ray.get(self._running)
            node.put(folder, files)
            self._end(ended)
        elif self._mirror is None and time.monotonic() - self._mirrored >= MIRROR_EVERY:
            self._mirrored = time.monotonic()
            self._mirror = self._actor.changed.remote()

    def _ready(self, answer: Any) -> bool:
        return bool(self._cluster.ray.wait([answer], timeout=0)[0])

    def _end(self, ended: Ended | None) -> None:
        self._done, self._ended = True, ended
        self._cluster.ray.kill(self._actor)


def needed(config: RunConfig, split: str) -> Paths:
    """(key, full path) of what must be on every machine; generated data are made where they are not."""
    found = [(f"imports.{i}", Path(path)) for i, path in enumerate(config.imports)]
    data, weights = config.data, config.model.backbone.weights
    if data.type == "coco":
        for name in dict.fromkeys(("train", "val", split)):
            given = getattr(data, name)
            if given is not None:
                found.append((f"data.{name}.annotations", data.root / given.annotations))
                found.append((f"data.{name}.images", data.root / given.images))
    if weights is not None:
        found.append(("model.backbone.weights", weights))
    return tuple((key, str(Path.cwd() / path)) for key, path in found)


def _look() -> Any:
    """`node.look` as a function that also a machine without our code can be sent, and answer what it lacks."""
    source = """
def look(token, paths):
    try:
        from detector.lab import node
    except ImportError as error:
        return str(error)
    return node.look(token, paths)
"""
    space: dict[str, Any] = {"__name__": "__main__"}  # Ray sends functions of this module whole
    exec(source, space)
    return space["look"]


def _on(one: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(one, soft=False)


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise UserError(INSTALL) from None
    return ray
