"""Several workers, each a process: all end with the same model, exact over what all were fed."""

import json

import numpy as np
import pytest
import tf_keras

from tests.helpers.assertions import assert_bitwise, assert_mean, assert_variance, assert_weights
from tests.helpers.forks import Fork
from tests.helpers.kit import KITS
from tests.helpers.processes import kept_ports
from tests.helpers.worker import (
    EPOCHS,
    GENERATED,
    SAMPLES,
    SCENARIOS,
    SIZES,
    START,
    STEPS,
    samples_of,
)


def run(directory, scenario, n_devices, workers=2):
    """Run the workers; return the exit code and the output of each."""
    call = f"main({str(directory)!r}, {scenario!r}, {n_devices})"
    program = f"from tests.helpers.worker import main; {call}"
    processes = []
    with kept_ports(workers) as addresses:
        for index in range(workers):
            task = {"type": "worker", "index": index}
            config = {"cluster": {"worker": addresses}, "task": task}
            processes.append(Fork(program, TF_CONFIG=json.dumps(config)))
        results = [process.result() for process in processes]
    return [(result.returncode, result.stdout + result.stderr) for result in results]


def arrays_in(file):
    with np.load(file) as arrays:
        return dict(arrays)


def finish(folder, scenario, n_devices):
    """Run the workers to their end; return what each wrote down."""
    for code, output in run(folder, scenario, n_devices):
        assert code == 0, output[-4000:]
    return [arrays_in(folder / f"{i}.npz") for i in range(2)]


@pytest.mark.exactness
@pytest.mark.parametrize(("scenario", "n_devices"), [("even", 2), ("stopped", 2)])
def test_two_workers_are_one(tmp_path, scenario, n_devices):
    workers = finish(tmp_path, scenario, n_devices)
    assert_one(workers, tmp_path / "model.keras", scenario, n_devices)
    if scenario == "even":
        for feed in ("arrays", "dataset", "generator"):
            assert_pooled([arrays_in(tmp_path / f"{feed}-{i}.npz") for i in range(2)], feed)


def assert_one(workers, model_file, scenario, n_devices):
    """Both workers ended with the same, and with what the definition gives for all data."""
    first, second = workers

    # Both hold the same, bit by bit, on each replica.
    own = ("samples",)
    assert list(first) == list(second)
    for name in first:
        if not name.startswith(own):
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for i in range(2):
        for name in ("mean", "variance"):
            replicas = first[f"{name}{i}"]
            assert len(replicas) == n_devices
            assert (replicas == replicas[0]).all()

    setup = SCENARIOS[scenario]
    averaged = range(START, setup.end + 1)
    n_weights = sum(name.startswith("weights") for name in first)
    snapshots = [
        [first[f"snapshot{e}_{i}"].astype(np.float64) for e in averaged] for i in range(n_weights)
    ]
    weights = [first[f"weights{i}"] for i in range(n_weights)]
    shares = [(setup.ema_momentum or 1) ** (setup.end - e) for e in averaged]
    assert_weights(weights, [np.average(s, 0, shares) for s in snapshots])
    assert first["n_averaged"] == len(averaged)

    # The statistics are those of the union of what the workers' replicas were fed.
    for i in range(2):
        seen = np.concatenate([w[f"samples{i}"] for w in (first, second)]).astype(np.float64)
        assert_mean(first[f"mean{i}"][0], seen.mean(0), seen.std(0))
        assert_variance(first[f"variance{i}"][0], seen.var(0))
    if setup.bn_data:
        seen = np.concatenate([w["samples0"] for w in (first, second)])
        assert_bitwise([np.sort(seen, 0)], [np.sort(samples_of(9, SAMPLES)[0], 0)])
    else:
        fed = [
            samples_of(i, n_devices * ((STEPS - 1) * SIZES[i] + min(setup.lasts[i], SIZES[i])))[0]
            for i in range(2)
        ]
        for worker, x in zip((first, second), fed, strict=True):
            np.testing.assert_allclose(worker["samples0"].sum(0), x.sum(0), rtol=1e-5)
    assert first["inferred_batch_size"] == n_devices * sum(SIZES)

    history = json.loads(str(first["history"]))
    assert len(history["loss"]) == setup.end + (not setup.bn_data)
    last_rate = 0.02 if setup.bn_data else 0.0
    np.testing.assert_allclose(history["learning_rate"][-2:], [0.02, last_rate], rtol=1e-6)
    assert first["rate"] == pytest.approx(0.02)
    tap = {"Tap": KITS[1].Tap}
    saved = tf_keras.models.load_model(model_file, custom_objects=tap)
    for array, weight in zip(weights, saved.trainable_variables, strict=True):
        np.testing.assert_array_equal(array, weight.numpy())
    np.testing.assert_array_equal(first["variance0"][0], saved.layers[1].moving_variance.numpy())
    x, y = samples_of(7, 16)
    assert history["val_loss"][-1] == pytest.approx(saved.evaluate(x, y, verbose=0), rel=1e-5)


def assert_pooled(workers, feed):
    """`update_bn` gave both workers the statistics of what all were fed."""
    first, second = workers
    given = [samples_of(9, SAMPLES)[0]]
    if feed == "generator":
        given = [samples_of(i, sum(sizes))[0] for i, sizes in enumerate(GENERATED)]
    given = np.concatenate(given).astype(np.float64)
    for i in range(2):
        of_workers = [worker[f"samples{i}"].astype(np.float64) for worker in workers]
        assert all(map(len, of_workers))
        seen = np.concatenate(of_workers)
        if i == 0:
            assert_bitwise([np.sort(seen, 0)], [np.sort(given, 0)])
        for name in ("mean", "variance"):
            assert_bitwise(first[f"{name}{i}"], second[f"{name}{i}"])
            assert_bitwise(first[f"{name}{i}"][:1], first[f"{name}{i}"][1:])
        assert_mean(first[f"mean{i}"][0], seen.mean(0), seen.std(0))
        assert_variance(first[f"variance{i}"][0], seen.var(0))
    assert first["n_samples"] == second["n_samples"] == len(given)


@pytest.mark.exactness
def test_a_worker_dies_the_other_ends_with_an_error_and_both_can_be_resumed(tmp_path):
    never_folder, folder = tmp_path / "never", tmp_path / "died"
    never_folder.mkdir()
    folder.mkdir()
    never = finish(never_folder, "uneven", 1)
    assert_one(never, never_folder / "model.keras", "uneven", 1)

    (survivor, output), (died, _) = run(folder, "dies", 1)
    assert died == 9
    assert survivor not in (0, 9)
    assert "Error" in output
    assert sorted(p.name for p in (folder / "swa").glob("*.index")) == [
        "swa-epoch-00002.index", "swa-epoch-00003.index"
    ]  # fmt: skip

    resumed = finish(folder, "resumed", 1)
    assert not (folder / "swa").exists()
    for a, b in zip(resumed, never, strict=True):
        assert len(json.loads(str(a["history"]))["loss"]) == EPOCHS - 3
        for name in a:
            if not name.startswith(("snapshot", "history")):
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_keras_3_says_what_to_do_about_several_workers(tmp_path):
    for code, output in run(tmp_path, "keras3", 1):
        assert code != 0
        for words in ("Keras 3 cannot train with several workers", "swa_dist.tfkeras"):
            assert words in output


def test_keras_3_trains_with_one_worker(tmp_path):
    ((code, output),) = run(tmp_path, "keras3", 2, workers=1)
    assert code == 0, output[-4000:]
    assert "several workers" not in output
