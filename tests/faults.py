"""Runs that are killed: what they leave goes on to the very end of an undisturbed run

`kill_runs(8, seed, folder)` kills eight, `kill_runs(100, seed, folder)` a hundred. Every other one
kills itself at a moment of its file work: before or after a file gets its name, within a write,
between the files that belong together. The others are killed at a random moment.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

RUN = dict(n_images=192, holdout=64, size=16, epochs=3, batch_size=64, queue_size=128, dim=16)
RUN |= dict(mixing="posneg", knn_every=1, readouts="knn_backbone", precision="fp32", progress=False)
WATCHED = ("replace", "link", "unlink", "fsync")  # of os


def processes():
    "Children of a server that has imported everything: a start takes no time"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ftcl.train"])
    return context


class Watch:
    "Counts the moments of the file work in a folder; at one of them the process dies"

    def __init__(self, folder, die_at=None):
        self.folder = os.path.realpath(folder)
        self.die_at = die_at
        self.moments = []  # names, as `before replace run.json`
        for name in WATCHED:
            setattr(os, name, self.watched(name, getattr(os, name)))
        self.write = Path.write_bytes
        Path.write_bytes = lambda path, data: self.half(path, data)

    def moment(self, when, path):
        if os.path.dirname(path).startswith(self.folder) or path == self.folder:
            if len(self.moments) == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            parts = os.path.basename(path).split(".")
            kept = [part for part in parts if "-" not in part and part != "part"]
            self.moments.append(f"{when} {'.'.join(kept)}")

    def watched(self, name, call):
        def watching(*paths, **more):
            last = paths[-1]
            path = os.readlink(f"/proc/self/fd/{last}") if isinstance(last, int) else last
            path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            self.moment(f"before {name}", path)
            done = call(*paths, **more)
            self.moment(f"after {name}", path)
            return done

        return watching

    def half(self, path, data):
        self.write(path, data[: len(data) // 2])
        self.moment("within the write of", os.path.realpath(path))
        return self.write(path, data)


def train(folder, die_at=None, log=None, **parameters):
    "The run, from wherever it is; in a process of its own"
    from ftcl.train import pretrain

    torch.set_num_threads(1)
    watch = Watch(folder, die_at)
    pretrain(**RUN | parameters, out=str(folder), name="run", resume=True)
    if log is not None:
        log.write_text(json.dumps(watch.moments))


def train_within(folder, code, variables, said):
    "The run with these variables, after this code; what it printed goes to a file"
    os.environ.update(variables)
    with open(said, "w") as out, redirect_stdout(out):
        try:
            exec(code, {})
            train(folder)
        except ValueError as e:
            print(type(e).__name__, e)


def finish(folder, **more):
    "Run to the end; whether it got there"
    run = processes().Process(target=train, args=(folder,), kwargs=more)
    run.start()
    run.join()
    return run.exitcode == 0


def kill_later(folder, seconds, **parameters):
    "Kill a run that long after it took its lock; whether it was still alive"
    run = processes().Process(target=train, args=(folder,), kwargs=parameters)
    run.start()
    while run.is_alive() and not (folder / "run.lock").exists():
        time.sleep(0.001)
    run.join(seconds)
    alive = run.is_alive()
    run.kill()
    run.join()
    return alive


def kill_at(folder, moment):
    "Let a run kill itself at a moment of its file work; whether it died of it"
    run = processes().Process(target=train, args=(folder, moment))
    run.start()
    run.join()
    return run.exitcode == -signal.SIGKILL


def state(folder):
    "All that must be equal, as bytes and numbers"
    import pandas as pd

    from ftcl.checkpoint import read_checkpoint
    from ftcl.record import read_record

    tensors, note = read_checkpoint(folder / "run.safetensors")
    record = read_record(folder / "run.json")
    table = pd.read_parquet(folder / "run.parquet")
    return dict(
        tensors={name: x.numpy().tobytes() for name, x in tensors.items()},
        step=note["step"],
        scores={name: (str(table[name].dtype), table[name].to_numpy().tobytes()) for name in table},
        record={key: record[key] for key in ("metrics", "epochs", "steps", "parameters")},
        files=sorted(path.name for path in folder.iterdir()),
    )


def undisturbed(folder):
    "The state that all must end in, the names of the moments, and the seconds that training took"
    log = folder / "moments.json"
    assert finish(folder / "whole", log=log)
    start = time.perf_counter()
    kill_later(folder / "timed", 600)
    seconds = time.perf_counter() - start
    return state(folder / "whole"), json.loads(log.read_text()), seconds


def kill_runs(count, seed, folder):
    "Kill runs, let each go on to its end, and compare: a list of dict(moment, equal)"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    wanted, moments, seconds = undisturbed(folder)
    kinds = {}
    for i, name in enumerate(moments):
        kinds.setdefault(name, []).append(i)
    order = chance.sample(sorted(kinds), len(kinds))
    outcomes = []
    for i in range(count):
        here = folder / f"run{i}"
        if i % 2 == 0:
            name = order[i // 2 % len(order)]
            at = chance.choice(kinds[name])
            died, moment = kill_at(here, at), f"{name}, number {at}"
        else:
            after = chance.uniform(0, seconds)
            while not (died := kill_later(here, after)):  # it was faster
                shutil.rmtree(here)
                after *= 0.7
            moment = f"after {after:.2f} s"
        equal = finish(here) and state(here) == wanted
        outcomes.append(dict(moment=moment, equal=equal, died=died))
    return outcomes


if __name__ == "__main__":
    for outcome in kill_runs(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]):
        print(outcome)
