"""One cell in a process of its own: the ordinary training of `tools/train.py`, then the record of what came out.

    python -m detector.lab.cell CELL_FOLDER

Goes on where an earlier process stopped.  `result.json` is written last and whole, so a cell that has one is finished.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from detector.config.load import load_config
from detector.errors import NonFiniteLoss, UserError
from detector.files import write_whole
from detector.lab.lock import locked
from detector.lab.record import observe, summary_of
from detector.train.loop import train

INTERRUPTED = 1
MATCHES, TREATMENT, ANNOTATIONS = "matches.npz", "treatment.npz", "annotations.json"


def run(folder: Path) -> int:
    """Trains and records the cell in `folder`, whose `cell.json` and `task.json` the study has written."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    # Where the cell is now: a study's folder may have been moved.
    config = load_config(folder / "cell.json", [f"run.dir={json.dumps(str(folder / 'run'))}"])
    begun = (config.folder / "config.yaml").exists() or (config.folder / "last.pt").exists()
    since = time.time()
    try:
        outcome = train(config, resume=config.folder if begun else None)
    except NonFiniteLoss as error:
        write_whole(folder / "failure.json", json.dumps({"kind": "diverged", "reason": str(error)}).encode())
        raise
    if outcome.interrupted_by is not None:
        print(f"{outcome.interrupted_by}: step {outcome.step} was finished and saved")
        return INTERRUPTED
    checkpoint = outcome.files.best if task["checkpoint"] == "best" else outcome.files.last
    record = observe(config, checkpoint, task["split"])
    record.matches.save(folder / MATCHES)
    record.treatment.save(folder / TREATMENT)
    write_whole(folder / ANNOTATIONS, json.dumps(record.annotation.tolist()).encode())
    classes = config.data.open(task["split"]).index.classes
    content = {
        "task": task,
        "step": outcome.step,
        "seconds_of_last_call": time.time() - since,
        **summary_of(record, outcome.files, config.train.batch_size, classes),
    }
    write_whole(folder / "result.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"AP {record.result.numbers['AP']:.3f}")
    return 0


def main(folder: Path) -> int:
    """The exit code: 0 finished, 2 a mistake in what was asked for, 1 interrupted."""
    try:
        with locked(folder):  # a cell that outlived its study must not be joined by a second process
            return run(folder)
    except UserError as error:
        print(f"error: {error}", flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
