"""A sweep of two runs on a Slurm of this machine: one is killed, and a second call finishes it

`make cluster`, or `python tests/cluster.py`. It starts munge and Slurm in a temporary folder, on
ports that are free, and stops them at its end. Nothing of the machine's own Slurm is read or
changed. Where something fails, the folder stays.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from getpass import getuser
from importlib.util import find_spec
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo")
SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin"  # where daemons lie, beside the user's PATH

# One run twice, under two names: only one of the two is killed.
RUN = dict(dataset="shapes", n_images=512, holdout=256, size=16, dim=16, batch_size=64)
RUN |= dict(queue_size=128, epochs=30, checkpoint_every=1, mixing="posneg", precision="fp32")
NAMES = ("whole", "killed")
SETTINGS = ["run:slurm_partition=lab", "run:runtime=15", "run:gpu=1", "run:mem_mb=2000"]

# The node only claims its memory and its GPUs: the runs are small, and compute on the CPU.
SLURM = """
ClusterName=ftcl
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=localhost CPUs=2 RealMemory=16000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES
PartitionName=lab Nodes=ALL
"""


def refuse_missing():
    "End with one sentence if a program or the plugin is missing"
    if not find_spec("snakemake_executor_plugin_slurm"):
        sys.exit(
            "make cluster needs a plugin of Snakemake: "
            f"{sys.executable} -m pip install snakemake-executor-plugin-slurm"
        )
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        sys.exit(
            f"make cluster needs {', '.join(missing)}: "
            "apt-get install munge slurmctld slurmd slurm-client (Debian, Ubuntu)"
        )


def free_ports(n):
    "Numbers of ports that nobody listens on"
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def until(true, what, call=None, seconds=120):
    "Wait for something; raises `AssertionError` if it does not come, or if the call ends before"
    end = time.monotonic() + seconds
    while not true():
        assert call is None or call.poll() is None, f"{what}: not before Snakemake ended"
        assert time.monotonic() < end, f"{what}: not within {seconds} seconds"
        time.sleep(0.2)


def told(*command):
    "What a command of Slurm prints"
    return subprocess.run(command, capture_output=True, text=True).stdout


def configure(folder):
    "Write all that Slurm reads, and let this process and its children use it"
    (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    text = SLURM.format(folder=folder, user=getuser(), ports=free_ports(2))
    (folder / "slurm.conf").write_text(text)
    # two files that every machine has stand for GPUs
    gpus = [f"Name=gpu File={file} Flags=no_gpu_env\n" for file in ("/dev/zero", "/dev/full")]
    (folder / "gres.conf").write_text("".join(gpus))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both runs compute on the CPU
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    # within a job the plugin starts srun without SLURM_CONF
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    command = f'SLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"'
    srun.write_text(f"#!/bin/sh\n{command}\n")
    srun.chmod(0o755)
    os.environ["PATH"] = f"{srun.parent}:{os.environ['PATH']}"


@contextlib.contextmanager
def slurm(folder):
    "Slurm, with one node of two cores; gone at the end, with all of its jobs"
    configure(folder)
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
    for name in ("socket", "pid-file", "log-file", "seed-file"):
        munged.append(f"--{name}={folder}/munge.{name.removesuffix('-file')}")
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            log = open(folder / f"{command[0]}.txt", "w")
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            if command is munged:
                until((folder / "munge.socket").exists, "munge answers")
        until(lambda: "idle" in told("sinfo", "--noheader"), "Slurm has a node")
        yield
    finally:
        told("scancel", "--signal=KILL", f"--user={getuser()}")
        with contextlib.suppress(AssertionError):
            until(lambda: not told("squeue", "--noheader"), "no job is left", seconds=20)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def write_study(folder, **changes):
    "The study that `snakemake runs` finds in the folder"
    settings = {name: dict(seeds=[0]) for name in NAMES}
    study = dict(about="One run, twice", shared=RUN | changes, settings=settings)
    encoders = dict(about="None: other rules look for them", shared={}, settings={})
    studies = {"tiny": study, "cifar10-transfer": encoders}
    (folder / "studies.yaml").write_text(yaml.safe_dump(studies))


@contextlib.contextmanager
def snakemake(folder):
    "A call of Snakemake with this project's profile, under way; its output goes to call.txt"
    command = [sys.executable, "-m", "snakemake", "--profile", ROOT / "profiles" / "slurm"]
    command += ["runs", "--set-resources", *SETTINGS]
    command += ["--slurm-status-command", "squeue"]
    command += ["--slurm-init-seconds-before-status-checks", "3"]
    with open(folder / "call.txt", "w") as log:
        call = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        yield call
        call.wait()
    finally:
        if call.poll() is None:
            call.kill()


def running():
    "Number of each job that runs: the name of its run; as the settings asked for it"
    columns = ("state", "jobid", "comment", "partition", "timelimit", "tres-per-job")
    wanted = "--Format=" + ",".join(f"{column}:|" for column in columns)
    jobs = {}
    for line in told("squeue", "--noheader", wanted).splitlines():
        state, number, about, *asked = line.rstrip("|").split("|")
        if state == "RUNNING":
            assert asked == ["lab", "15:00", "gres:gpu:1"], asked
            jobs[about.removeprefix("rule_run_wildcards_tiny_").removesuffix("_0")] = number
    return jobs


def contents(path):
    "The bytes of a run's scores, and its record but for its name, its times and its stops"
    record = json.loads(path.with_suffix(".json").read_text())
    for name in ("name", "seconds", "images_per_second"):
        del record[name]
    record.pop("resumed_at", None)
    return path.with_suffix(".parquet").read_bytes(), record


def kill_one(folder):
    "First call: both at once; one is killed after its third checkpoint, the other is finished"
    killed = folder / "results" / "tiny" / "killed-s0.json"
    with snakemake(folder) as call:
        until(lambda: set(running()) == set(NAMES), "two jobs run at once", call)
        job = running()["killed"]
        parts = killed.with_suffix(".scores")
        until((parts / "000002.parquet").exists, "three checkpoints", call)
        subprocess.run(["scancel", "--signal=KILL", job], check=True)
    said = (folder / "call.txt").read_text()
    log = folder / ".snakemake" / "slurm_logs" / "rule_run" / "tiny_killed_0" / f"{job}.log"
    assert call.returncode == 1 and f"SLURM-job '{job}' failed" in said
    assert str(log) in said and log.exists()
    assert killed.with_name("whole-s0.json").exists() and not killed.exists()
    print(f"two jobs at once; the second was killed after {len(list(parts.iterdir()))} epochs")


def times(parts):
    "When each part of a run's scores was written"
    found = {}
    with contextlib.suppress(FileNotFoundError):  # a run removes them at its end
        for part in parts.iterdir():
            found[part.name] = part.stat().st_mtime_ns
    return found


def finish_it(folder):
    "Second call: the killed run alone, from its checkpoint to the very end of the other one"
    results = folder / "results" / "tiny"
    parts = results / "killed-s0.scores"
    before = times(parts)
    other = (results / "whole-s0.json").stat().st_mtime_ns
    went_on = False
    with snakemake(folder) as call:
        while call.poll() is None:
            now = times(parts)
            went_on |= len(now) > len(before) and before.items() <= now.items()
            time.sleep(0.1)
    assert call.returncode == 0, (folder / "call.txt").read_text()
    assert went_on, "the second call began anew"
    assert (results / "whole-s0.json").stat().st_mtime_ns == other
    assert contents(results / "killed-s0") == contents(results / "whole-s0")
    print("a second call went on from there: scores and record are those of the other run")


def ask_again(folder):
    "Third call: nothing is left to do; with another parameter it is refused, and nothing is lost"
    results = folder / "results" / "tiny"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    with snakemake(folder) as call:
        call.wait()
    assert call.returncode == 0 and "Nothing to be done" in (folder / "call.txt").read_text()
    write_study(folder, dim=32)
    with snakemake(folder) as call:
        call.wait()
    assert call.returncode == 1
    [log] = (folder / ".snakemake" / "slurm_logs").glob("rule_run/tiny_whole_0/*.log")
    assert "InputError: results/tiny/whole-s0.json holds the record" in log.read_text()
    assert str(log) in (folder / "call.txt").read_text()
    assert before == {path.name: path.read_bytes() for path in results.iterdir()}
    print("a third had nothing to do; another parameter was refused, and nothing was lost")


def main():
    os.environ["PATH"] += f":{SYSTEM}"
    refuse_missing()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the daemons are stopped
    folder = Path(tempfile.mkdtemp(prefix="ftcl-cluster-"))
    shutil.copy(ROOT / "Snakefile", folder)
    (folder / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "pretrain.ipynb", folder / "nbs")
    write_study(folder)
    print(f"Slurm and the runs are in {folder}", flush=True)
    with slurm(folder):
        kill_one(folder)
        finish_it(folder)
        ask_again(folder)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
