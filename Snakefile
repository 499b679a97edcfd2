# The paper as a graph of notebook runs.
#   snakemake --cores 2 figures              draws every picture whose records or notebook changed
#                                            (make figures); with -F, and the first time in a
#                                            clone, every one
#   snakemake --cores 2 runs                 trains the runs whose records are missing, one core
#                                            each
#   snakemake --profile profiles/slurm runs  the same on a cluster, one job a run
#                                            (profiles/kubernetes: not tried on a real one)
# A second call finishes a run that was stopped, from its last checkpoint.
import shlex
import sys
from pathlib import Path


configfile: "studies.yaml"


# Of every shell command below, on every node: freed memory stays with the process, so that a step
# takes less time and gives the same numbers (nbs/benchmark.ipynb). glibc needs both.
shell.prefix(
    "set -euo pipefail; "
    "export MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824; "
)

PAPERMILL = f"{sys.executable} -m papermill --no-progress-bar --log-level WARNING"

FIGURES = {  # notebook in nbs/figures: (studies that it is drawn from, *: all; its pictures)
    "idea": ("cifar10-transforms", ["idea", "answer"]),
    "motivation": ("cifar10-momentum", ["motivation"]),
    "pipeline": ("sphere cifar10-settings", ["pipeline"]),
    "sphere": ("sphere", ["sphere", "sphere-pair"]),
    "momentum": (
        "cifar10-momentum",
        [
            "cifar10-momentum-scores", "cifar10-momentum-depth", "cifar10-momentum-landscape",
            "cifar10-momentum-accuracy",
        ],
    ),
    "gradient": (
        "cifar10-momentum",
        ["cifar10-gradient-none", "cifar10-gradient-posneg", "cifar10-gradient-landscape"],
    ),
    "extrapolation": (
        "cifar10-momentum cifar10-settings", ["cifar10-extrapolation-scores", "l-ex-density"],
    ),
    "interpolation": ("cifar10-momentum", ["cifar10-interpolation-scores", "l-in-density"]),
    "alpha": ("cifar10-settings", ["cifar10-alpha", "cifar10-level"]),
    "start_epoch": (
        "cifar10-settings cifar10-few",
        ["cifar10-start-epoch", "cifar10-start-landscape", "cifar10-start-ratio"],
    ),
    "epochs": ("cifar10-settings", ["cifar10-epochs"]),
    "methods": ("cifar10-methods cifar10-transforms cifar10-rates", ["methods"]),
    "tasks": ("cifar10-transfer transfer-*", ["tasks"]),
    "discussion": ("cifar10-transforms", ["cifar10-discussion"]),
    "auto": (
        "cifar10-transforms cifar10-methods cifar10-auto",
        ["cifar10-auto", "cifar10-auto-accuracy"],
    ),
    "mixing": ("cifar10-mixing", ["cifar10-mixing-accuracy", "cifar10-mixing-scores"]),
    "regime": ("cifar10-regime", ["cifar10-regime", "cifar10-controls", "cifar10-collapse"]),
    "screening": ("cifar10-screening", ["cifar10-screening"]),
    "few": ("cifar10-few", ["cifar10-few", "cifar10-few-course"]),
    "longer": (
        "cifar10-long cifar10-long-16 tiny-imagenet-100 cifar10-transforms",
        ["cifar10-long", "longer"],
    ),
    "hardness": (
        "cifar10-curve directions",
        [
            "cifar10-hardness", "cifar10-flight", "cifar10-pull-push", "cifar10-filter",
            "cifar10-directions",
        ],
    ),
    "schedule": (
        "cifar10-schedule cifar10-schedule-check",
        ["cifar10-schedule", "cifar10-schedule-check"],
    ),
    "threshold": ("cifar10-threshold escape escape-224", ["threshold", "threshold-224"]),
    "resnet": (
        "cifar10-resnet18 fair-recipe", ["cifar10-resnet18-fair", "cifar10-resnet18-scores"],
    ),
    "verdict": ("*", ["verdict"]),
    "claims": ("*", ["claims"]),
}
RUNS = [
    f"results/{study}/{setting}-s{seed}"
    for study, about in config.items()
    for setting, own in about["settings"].items()
    for seed in own["seeds"]
]

TASKS = {  # folder in results: notebook, and its parameters, for each encoder of cifar10-transfer
    "transfer-tiny": (
        "evaluate", "-p dataset tiny-imagenet-100 -p size 32 -p n_images 20000"
        " -p readouts knn_backbone+logreg_backbone",
    ),
    "transfer-labels": ("evaluate", "-p readouts finetune_1pct+finetune_10pct"),
    "transfer-finetune": ("evaluate", "-p n_images 5000 -p readouts finetune"),
    "transfer-long-tail": ("evaluate", "-p readouts longtail_backbone"),
    "transfer-bccd": ("transfer", "-p dataset bccd -p evaluate_on test -p size 240"),
}
ENCODERS = [
    f"{setting}-s{seed}"
    for setting, own in config["cifar10-transfer"]["settings"].items()
    for seed in own["seeds"]
]


def pictures(names):
    "Their files"
    return [f"figures/{name}.{ending}" for name in names for ending in ("png", "pdf")]


def records(studies):
    "The records that a figure is drawn from"
    # as absolute paths, which no rule makes: drawing never trains
    files = [p for study in studies.split() for p in Path("results").glob(f"{study}/*")]
    return sorted(str(p.resolve()) for p in files if p.suffix in (".json", ".parquet"))


def parameters(study, setting, seed):
    "Of one run of `pretrain.ipynb`, as papermill takes them"
    own = dict(config[study]["settings"][setting])
    del own["seeds"]
    p = config[study]["shared"] | own | dict(seed=seed, name=f"{setting}-s{seed}")
    return " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in p.items())


rule figures:
    input:
        pictures(name for _, names in FIGURES.values() for name in names),
        [f"runs/figures/{notebook}.drawn" for notebook in FIGURES],


rule runs:
    input: [f"{run}.{ending}" for run in RUNS for ending in ("json", "parquet")]


rule readouts:
    input: [f"results/{task}/{name}.json" for task in TASKS for name in ENCODERS]


for notebook, (studies, names) in FIGURES.items():
    rule:
        name: f"figure_{notebook}"
        input:
            notebook=f"nbs/figures/{notebook}.ipynb",
            records=records(studies),
        # Drawing replaces a picture at once, so that none is removed before (`update`). A failure
        # leaves the old one, with a new date: the missing `.drawn` says that it is an old one.
        output:
            update(pictures(names)),
            touch(f"runs/figures/{notebook}.drawn"),
        log: f"runs/figures/{notebook}.ipynb"
        shell: "{PAPERMILL} {input.notebook} {log}"


rule run:
    # `resume` goes on from a checkpoint, and takes a finished record as it lies. So a record must
    # not be removed first, as any other output is (`update`): remove it yourself to train anew.
    output:
        update("results/{study}/{setting}-s{seed,[0-9]+}.json"),
        update("results/{study}/{setting}-s{seed}.parquet"),
    wildcard_constraints: study="|".join(config)
    log: "runs/{study}/{setting}-s{seed}.ipynb"
    params:
        lambda w: parameters(**w),
        out=lambda w, output: Path(output[0]).parent,
    threads: 1
    # Slurm sends SIGTERM half a minute before it kills a job, and the run then saves a checkpoint.
    # Papermill would die of the signal at once, and the run with it: here it ignores the signal.
    shell:
        "trap '' TERM; "
        "OMP_NUM_THREADS={threads} {PAPERMILL} nbs/pretrain.ipynb {log} {params[0]} "
        "-p out {params.out} -y 'resume: true'"


rule readout:
    # from the checkpoint that a run leaves beside its record, which is not in git
    # (without it remove the run's record of cifar10-transfer and make `runs`)
    input: "results/cifar10-transfer/{setting}-s{seed}.safetensors"
    output: "results/{task}/{setting}-s{seed,[0-9]+}.json"
    wildcard_constraints: task="|".join(TASKS)
    log: "runs/{task}/{setting}-s{seed}.ipynb"
    params:
        notebook=lambda w: TASKS[w.task][0],
        given=lambda w: TASKS[w.task][1],
    threads: 1
    shell:
        "OMP_NUM_THREADS={threads} {PAPERMILL} nbs/{params.notebook}.ipynb {log} "
        "-p checkpoint {input} -p seed {wildcards.seed} -p precision fp32 "
        "-p out results/{wildcards.task} -p name {wildcards.setting}-s{wildcards.seed} "
        "{params.given}"


rule vectors:
    # from the checkpoint that a run leaves beside its record, which is not in git
    # (without it remove none-s0.* of cifar10-settings and make `runs`)
    input: "results/cifar10-settings/none-s0.safetensors"
    output: "results/sphere/vectors.json"
    log: "runs/sphere/vectors.ipynb"
    params: "-p n_pairs 256 -p n_keys 512 -p out results/sphere"
    shell: "{PAPERMILL} nbs/vectors.ipynb {log} -p checkpoint {input} {params}"
