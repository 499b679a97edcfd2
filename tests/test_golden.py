"Runs leave what they left at the revision that golden.json names: rewriting changed no result"

import json

import golden
import pytest

from ftcl.core import native_precision
from ftcl.scores import BINS, LIMIT
from ftcl.train import pretrain

KEPT = json.loads(golden.FILE.read_text())
RUNS = {", ".join(f"{n}={v}" for n, v in run["setting"].items()): run for run in KEPT["runs"]}
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_kept_runs_are_those_that_are_compared():
    assert [run["setting"] for run in KEPT["runs"]] == golden.CASES


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_the_same_bits(name, tmp_path):
    """To the last bit on the platform that made the file

    Elsewhere sums are rounded otherwise, and training amplifies that from step to step. So there
    the first step is compared, before any weight moves. A score is a sum of products of features
    that passed ten layers: 1e-3 is ten thousand units of the last digit of float32, and 0.02 is
    five of bfloat16. A quantile may fall into the next bin of its histogram.
    """
    kept = RUNS[name]
    setting = kept["setting"]
    bf16 = setting.get("precision") == "bf16"
    if bf16 and native_precision() != "bf16":
        pytest.skip("this processor only imitates bfloat16")
    now = golden.measure(pretrain, setting, tmp_path)
    if KEPT["platform"] == golden.platform_name():
        assert {**now, "setting": setting} == kept
    assert now["first"].keys() == kept["first"].keys()
    for column, value in kept["first"].items():
        tolerance = (0.02 if bf16 else 1e-3) + (2 * LIMIT / BINS if "_q" in column else 0)
        if value is None:
            assert now["first"][column] is None, column
        else:
            near = pytest.approx(value, rel=tolerance, abs=tolerance)
            assert now["first"][column] == near, column
