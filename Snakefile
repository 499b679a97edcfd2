# The paper as a graph of notebook runs.
#   snakemake --cores 2 figures    draws every picture whose records or notebook changed (make figures)
#   snakemake --cores 2 runs       trains the runs whose records are missing, one core each
# On a cluster the same, with an executor plugin: snakemake --executor slurm --jobs 20 runs
import sys
from pathlib import Path

PAPERMILL = f"{sys.executable} -m papermill --no-progress-bar --log-level WARNING"

FIGURES = {  # notebook in nbs/figures: (folder of its records, its pictures)
    "mixing": ("cifar10-mixing", ["cifar10-mixing-accuracy", "cifar10-mixing-scores"]),
    "regime": ("cifar10-regime", ["cifar10-regime", "cifar10-controls", "cifar10-collapse"]),
    "momentum": ("cifar10-momentum", ["cifar10-momentum-scores", "cifar10-momentum-depth", "cifar10-momentum-accuracy"]),
    "gradient": ("cifar10-momentum", ["cifar10-gradient-none", "cifar10-gradient-posneg"]),
    "extrapolation": ("cifar10-momentum", ["cifar10-extrapolation-scores", "l-ex-density"]),
    "interpolation": ("cifar10-momentum", ["cifar10-interpolation-scores", "l-in-density"]),
}
MOMENTUM = [("none", m) for m in ("1", "0.999", "0.99", "0.9", "0.8", "0.7", "0.6", "0.5")]
MOMENTUM += [("posneg", m) for m in ("0.999", "0.99", "0.9", "0.5")] + [("pos", "0.99"), ("neg", "0.99")]


rule figures:
    input: [f"figures/{p}.{ending}" for _, pictures in FIGURES.values() for p in pictures for ending in ("png", "pdf")]


rule runs:
    input: [f"results/cifar10-momentum/{mixing}-momentum{m}-s{seed}.json" for mixing, m in MOMENTUM for seed in (0, 1)]


for notebook, (study, pictures) in FIGURES.items():
    rule:
        name: f"figure_{notebook}"
        input:
            notebook=f"nbs/figures/{notebook}.ipynb",
            records=sorted(str(p) for p in Path("results", study).glob("*") if p.suffix in (".json", ".parquet")),
        output: [f"figures/{p}.{ending}" for p in pictures for ending in ("png", "pdf")]
        log: f"runs/figures/{notebook}.ipynb"
        shell: "{PAPERMILL} {input.notebook} {log}"


rule momentum_run:
    output:
        record="results/cifar10-momentum/{mixing}-momentum{m}-s{seed}.json",
        scores="results/cifar10-momentum/{mixing}-momentum{m}-s{seed}.parquet",
    log: "runs/cifar10-momentum/{mixing}-momentum{m}-s{seed}.ipynb"
    threads: 1
    shell:
        "OMP_NUM_THREADS={threads} {PAPERMILL} nbs/pretrain.ipynb {log} -p dataset cifar10 -p n_images 20000 "
        "-p holdout 5000 -p bn_splits 8 -p epochs 8 -p batch_size 256 -p tau 0.07 -p queue_size 4096 -p knn_every 4 "
        "-p checkpoint_every 0 -p mixing {wildcards.mixing} -p momentum {wildcards.m} -p seed {wildcards.seed} "
        "-p out results/cifar10-momentum -p name {wildcards.mixing}-momentum{wildcards.m}-s{wildcards.seed}"
