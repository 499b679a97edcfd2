"""What runs left behind at the revision named in golden.json

`OMP_NUM_THREADS=1 PYTHONPATH=<a checkout> python tests/golden.py` writes that file anew.
"""

import hashlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
FILE = HERE / "golden.json"
SMALL = dict(n_images=80, holdout=32, size=16, epochs=2, batch_size=16, queue_size=40, dim=16)
SMALL |= dict(lr=0.02, precision="fp32", progress=False)
SETTINGS = [dict(mixing="none")]
SETTINGS += [
    dict(mixing=mixing, level=level)
    for mixing in ("pos", "neg", "posneg")
    for level in ("feature", "sample", "dimension")
]
EVERY = [
    dict(method=method, symmetric=symmetric) | setting
    for method in ("moco_v1", "moco_v2")
    for symmetric in (False, True)
    for setting in SETTINGS
]
SINGLE = [
    dict(renormalize=True, level="dimension"),
    dict(detach_key=True),
    dict(neg_query="original"),
    dict(strength=0.3, alpha=0.5, alpha_neg=4.0),
    dict(start_epoch=1),
    dict(tau_pos=0.05, mixing="none"),
    dict(bn_splits=2, symmetric=True),
    dict(augmentation="A", momentum=0.9, tau=0.2, seed=3),
    dict(encoder="resnet18", epochs=1, size=8),
    dict(precision="bf16", level="sample"),
    dict(record_every=2, knn_every=1),
]
CASES = EVERY + [dict(method="moco_v2", mixing="posneg") | setting for setting in SINGLE]


def platform_name():
    "What decides how numbers are rounded"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = "bf16" if torch.cpu._is_avx512_bf16_supported() else "no bf16"
    version = torch.__version__.split("+")[0]
    return f"{model}, {capability}, {bf16}, torch {version}, {torch.get_num_threads()} thread(s)"


def digest(tensors):
    "One short number for names and bits of many tensors"
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode())
        h.update(tensors[name].contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def columns_that_stand(table, setting):
    "The recorded columns, without l where it was the first of many, and is their mean now"
    one_l = setting.get("level", "feature") == "feature" and not setting.get("symmetric")
    return table if one_l else table.drop(columns=["l_ex", "l_in"])


def measure(pretrain, setting, folder):
    "Run a setting: digests of checkpoint and scores, its metrics, and the scores of its first step"
    pretrain(**SMALL | setting, out=str(folder), name="golden")
    tensors = load_file(Path(folder) / "golden.safetensors")
    tensors = {n: t for n, t in tensors.items() if n.startswith(("method.", "sgd."))}
    table = columns_that_stand(pd.read_parquet(Path(folder) / "golden.parquet"), setting)
    scores = {c: torch.tensor(table[c].to_numpy()).double() for c in sorted(table)}
    first = {c: None if math.isnan(v) else v for c, v in table.iloc[0].items()}
    metrics = json.loads((Path(folder) / "golden.json").read_text())["metrics"]
    return dict(checkpoint=digest(tensors), scores=digest(scores), metrics=metrics, first=first)


if __name__ == "__main__":
    from ftcl.train import pretrain

    torch.set_num_threads(1)
    package = Path(sys.modules["ftcl"].__file__).parent
    git = ["git", "-C", str(package), "rev-parse", "--short=10", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    made = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            made.append(dict(setting=case) | measure(pretrain, case, folder))
    content = dict(revision=revision, platform=platform_name(), runs=made)
    FILE.write_text(json.dumps(content, indent=0) + "\n")
