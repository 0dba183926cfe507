"""The Kaggle kernel runs, resumes, and finds its strategy on each kind of machine."""

import ast
import itertools
import re
from types import SimpleNamespace

import pytest
import tensorflow as tf

from tests.helpers.processes import ROOT, run_python

KERNEL = (ROOT / "scripts" / "kaggle_kernel.py").read_text()

TWICE = """
kernel = open("kernel.py").read()
exec(kernel.replace("in range(FOLDS)", "in range(1)"), {})
print("cut off before the last fold")
exec(kernel, {})
"""
SHORTER = {
    "FOLDS, EPOCHS, START, BATCH = 3, 20, 15, 16": "FOLDS, EPOCHS, START, BATCH = 2, 3, 1, 16",
    "load_digits(return_X_y=True)": "load_digits(n_class=2, return_X_y=True)",
    "[tf.config.LogicalDeviceConfiguration()] * 4": "[tf.config.LogicalDeviceConfiguration()] * 2",
    "for i in range(4)": "for i in range(2)",
}


def test_it_trains_each_fold_once_however_often_it_is_run(tmp_path):
    shorter = KERNEL
    for shown, short in SHORTER.items():
        assert shown in shorter
        shorter = shorter.replace(shown, short)
    (tmp_path / "kernel.py").write_text(shorter)
    result = run_python("-W", "error::UserWarning:swa_dist", "-c", TWICE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    for printed, folds in zip(
        result.stdout.split("cut off before the last fold"), (1, 2), strict=True
    ):
        assert printed.count("MirroredStrategy, batches of 32") == folds
        assert printed.count("final model weights set to stochastic weight average") == 1
        assert re.search(r"The averages are right on \d+\.\d% of the digits", printed)
    for fold, name in itertools.product(range(2), ("best", "averaged")):
        assert (tmp_path / f"output/fold{fold}/{name}.weights.h5").is_file()


class FakeTensorFlow:
    """TensorFlow on another machine; notes what is asked of the TPU."""

    def __init__(self, gpus):
        self.notes = []
        self.config = SimpleNamespace(
            list_physical_devices=lambda kind: ["GPU:0"] * gpus if kind == "GPU" else ["CPU:0"],
            experimental_connect_to_cluster=lambda tpu: self.notes.append("connect"),
            get_logical_device_configuration=lambda cpu: ["a CPU"] * 4,
        )
        self.tpu = SimpleNamespace(
            experimental=SimpleNamespace(
                initialize_tpu_system=lambda tpu: self.notes.append("initialize")
            )
        )
        self.distribute = SimpleNamespace(
            Strategy=tf.distribute.Strategy,
            ReductionToOneDevice=lambda: "one device",
            MirroredStrategy=lambda *devices, **_: ("mirrored", *devices),
            TPUStrategy=lambda tpu: ("tpu", tpu),
            cluster_resolver=SimpleNamespace(TPUClusterResolver=lambda tpu: f"{tpu} TPU"),
        )


def find_strategy(installed, gpus=0):
    """What the kernel's function returns where these distributions are installed."""
    (function,) = (
        node
        for node in ast.parse(KERNEL).body
        if isinstance(node, ast.FunctionDef) and node.name == "find_strategy"
    )
    fake = FakeTensorFlow(gpus)
    distributions = [SimpleNamespace(name=name) for name in installed]
    names = {"tf": fake, "metadata": SimpleNamespace(distributions=lambda: distributions)}
    exec(ast.unparse(function), names)
    return names["find_strategy"](), fake.notes


def test_a_tpu_is_used_where_its_tensorflow_is_installed_and_initialized_for_each_fold():
    for _ in range(2):
        strategy, notes = find_strategy(["numpy", "libtpu", "tensorflow-tpu"])
        assert strategy == ("tpu", "local TPU")
        assert notes == ["connect", "initialize"]


def test_on_a_tpu_machine_with_another_tensorflow_the_remedy_is_named():
    with pytest.raises(RuntimeError) as error:
        find_strategy(["tensorflow-cpu", "libtpu", "jax"])
    remedy = "pip uninstall -y tensorflow-cpu && pip install tensorflow-tpu==2.20.0"
    assert f"`{remedy}`" in str(error.value)


def test_else_all_gpus_are_used_or_four_virtual_cpus():
    assert find_strategy(["tensorflow"], gpus=2) == (("mirrored",), [])
    assert find_strategy(["tensorflow"]) == (("mirrored", [f"CPU:{i}" for i in range(4)]), [])


def test_the_guide_shows_the_function_as_it_is():
    guide = (ROOT / "swa_dist" / "GUIDE.md").read_text()
    (shown,) = (b for b in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "TPUS" in b)
    assert shown in KERNEL
