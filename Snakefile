# The paper as a graph of notebook runs.
#   snakemake --cores 2 figures              draws every picture whose records or notebook changed (make figures); with -F every one
#   snakemake --cores 2 runs                 trains the runs whose records are missing, one core each
#   snakemake --profile profiles/slurm runs  the same on a cluster, one job a run; any other executor plugin works alike
import re
import sys
from pathlib import Path

PAPERMILL = f"{sys.executable} -m papermill --no-progress-bar --log-level WARNING"

FIGURES = {  # notebook in nbs/figures: (folder of its records, its pictures)
    "motivation": ("cifar10-momentum", ["motivation"]),
    "pipeline": ("", ["pipeline"]),
    "sphere": ("sphere", ["sphere", "sphere-pair"]),
    "momentum": ("cifar10-momentum", ["cifar10-momentum-scores", "cifar10-momentum-depth", "cifar10-momentum-accuracy"]),
    "gradient": ("cifar10-momentum", ["cifar10-gradient-none", "cifar10-gradient-posneg", "cifar10-gradient-landscape"]),
    "extrapolation": ("cifar10-momentum", ["cifar10-extrapolation-scores", "l-ex-density"]),
    "interpolation": ("cifar10-momentum", ["cifar10-interpolation-scores", "l-in-density"]),
    "alpha": ("cifar10-settings", ["cifar10-alpha", "cifar10-level"]),
    "start_epoch": ("cifar10-settings", ["cifar10-start-epoch"]),
    "epochs": ("cifar10-settings", ["cifar10-epochs"]),
    "methods": ("cifar10-mixing", ["methods"]),
    "discussion": ("cifar10-regime", ["cifar10-discussion"]),
    "mixing": ("cifar10-mixing", ["cifar10-mixing-accuracy", "cifar10-mixing-scores"]),
    "regime": ("cifar10-regime", ["cifar10-regime", "cifar10-controls", "cifar10-collapse"]),
}

SHORT = dict(n_images=20000, holdout=5000, epochs=8)
STUDIES = {  # folder in results: (what its runs share, {seeds: settings}); a setting is a mixing and what else it changes
    "cifar10-mixing": (dict(epochs=16, knn_every=4, record_every=8), {3: "none pos neg posneg"}),
    "cifar10-momentum": (SHORT | dict(tau=0.07, knn_every=4), {
        2: "none-momentum1 none-momentum0.999 none-momentum0.99 none-momentum0.9 none-momentum0.8 none-momentum0.7 none-momentum0.6 none-momentum0.5 "
           "posneg-momentum0.999 posneg-momentum0.99 posneg-momentum0.9 posneg-momentum0.5 pos-momentum0.99 neg-momentum0.99"}),
    "cifar10-settings": (SHORT | dict(record_every=4), {
        3: "none pos neg posneg pos-alpha0.2 pos-alpha8 neg-alpha_neg0.2 neg-alpha_neg8 pos-levelsample neg-levelsample posneg-levelsample "
           "pos-leveldimension neg-leveldimension posneg-leveldimension posneg-start_epoch2 posneg-start_epoch4 posneg-start_epoch6",
        2: "none-epochs4 posneg-epochs4 none-epochs16 posneg-epochs16 none-epochs32 posneg-epochs32 posneg-epochs32-start_epoch8"}),
    "cifar10-regime": (SHORT | dict(record_every=6), {
        2: "none pos neg posneg pos-strength0.1 pos-strength0.2 pos-strength0.5 pos-start_epoch1 pos-start_epoch4 pos-start_epoch6 "
           "pos-renormalizeTrue pos-detach_keyTrue pos-neg_queryoriginal none-tau_pos0.0385 none-tau0.2 none-momentum0.5 pos-momentum0.5 "
           "none-momentum0.9 pos-momentum0.9 neg-momentum0.9 posneg-momentum0.9 none-momentum0.95 pos-momentum0.95",
        1: "pos-leveldimension pos-levelsample none-epochs24 pos-epochs24 neg-epochs24 none-tau0.05 pos-tau0.05 neg-tau0.05 pos-tau0.2 neg-tau0.2 "
           "none-tau0.4 pos-tau0.4 neg-tau0.4 none-lr0.03 pos-lr0.03 none-lr0.12 pos-lr0.12 none-lr0.24 none-momentum0.999 pos-momentum0.999 "
           "none-queue_size512 pos-queue_size512 none-queue_size16384 pos-queue_size16384"}),
}
RUNS = [f"results/{study}/{setting}-s{seed}" for study, (_, settings) in STUDIES.items() for seeds, names in settings.items() for setting in names.split() for seed in range(seeds)]


def parameters(study, setting, seed):
    "Of `pretrain.ipynb`, as papermill takes them"
    mixing, *changes = setting.split("-")
    changed = dict(re.fullmatch(r"([a-z_]+?)([0-9.]+|True|original|sample|dimension)", c).groups() for c in changes)
    shared = dict(dataset="cifar10", bn_splits=8, batch_size=256, queue_size=4096, tau=0.1, knn_every=0, checkpoint_every=0) | STUDIES[study][0]
    own = dict(mixing=mixing, seed=seed, out=f"results/{study}", name=f"{setting}-s{seed}")
    return " ".join(f"-p {n} {v}" for n, v in (shared | changed | own).items())


rule figures:
    input: [f"figures/{p}.{ending}" for _, pictures in FIGURES.values() for p in pictures for ending in ("png", "pdf")]


rule runs:
    input: [f"{run}.{ending}" for run in RUNS for ending in ("json", "parquet")]


for notebook, (study, pictures) in FIGURES.items():
    rule:
        name: f"figure_{notebook}"
        input:
            notebook=f"nbs/figures/{notebook}.ipynb",
            # absolute paths, which no rule makes: drawing never trains, not even with -F
            records=sorted(str(p.resolve()) for p in Path("results", study).glob("*") if study and p.suffix in (".json", ".parquet")),
        output: [f"figures/{p}.{ending}" for p in pictures for ending in ("png", "pdf")]
        log: f"runs/figures/{notebook}.ipynb"
        shell: "{PAPERMILL} {input.notebook} {log}"


rule run:
    output: "results/{study}/{setting}-s{seed,[0-9]+}.json", "results/{study}/{setting}-s{seed}.parquet"
    log: "runs/{study}/{setting}-s{seed}.ipynb"
    params: lambda w: parameters(**w)
    threads: 1
    resources: mem_mb=6000, runtime=60
    shell: "OMP_NUM_THREADS={threads} {PAPERMILL} nbs/pretrain.ipynb {log} {params}"


rule vectors:  # from the checkpoint that a run leaves beside its record (not in git: without it remove none-s0.* and make `runs`)
    input: "results/cifar10-settings/none-s0.safetensors"
    output: "results/sphere/vectors.json"
    log: "runs/sphere/vectors.ipynb"
    shell: "{PAPERMILL} nbs/vectors.ipynb {log} -p checkpoint results/cifar10-settings/none-s0.safetensors -p n_pairs 256 -p n_keys 512 -p out results/sphere"
