"""What averaging costs on a GPU, ours and PyTorch's on the same card."""

import numpy as np

from scripts.bench import averaging, isolated, training
from scripts.bench.averaging import COPY, FUSED, LIMIT, OURS, OURS_LATER, SWAP, TORCH
from scripts.bench.cost import Job, fit_ours
from scripts.bench.isolated import KERAS_VERSIONS
from scripts.bench.report import Page, ms, s, spread, table
from scripts.bench.training import PLAIN, UPDATE


def main() -> None:
    """Measure all on the first GPU."""
    card = isolated.call(name_of_gpu, gpu=True)
    Page("gpu.md", "./scripts/benchmark --gpu", f"Card: {card}.").measure(one_update, fit)


def name_of_gpu() -> str:
    """Return the name of the first GPU."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        raise RuntimeError("TensorFlow finds no GPU.")
    return str(tf.config.experimental.get_device_details(gpus[0])["device_name"])


def one_update(page: Page) -> None:
    """One update of ResNet-50's average."""
    network = ["application", "ResNet50", 32 if page.quick else 224]
    # An even number of swaps, and no update while the average is in the model.
    groups = [[OURS, LIMIT, FUSED], [OURS_LATER], [COPY], [SWAP]]
    found = isolated.call(averaging.steps, network, 0, groups, "gpu", gpu=True)
    times = {name: np.array(found[name]) for group in groups for name in group}
    for name in (OURS, OURS_LATER):
        page.aim(f"{name} / XLA-fused", times[name] / np.median(times[FUSED]), 1.2)
    for name in (COPY, SWAP):
        page.aim(f"{name}, ms", times[name] * 1e3, 2)
    rows = [[name, ms(seconds)] for name, seconds in times.items()]
    try:
        torch = isolated.call(averaging.torch_step, gpu=True)
    except isolated.FailedError as error:
        rows.append([TORCH, str(error)])
    else:
        rows.append([TORCH, ms(torch)])
        for name in (OURS, OURS_LATER):
            page.aim(f"{name} / PyTorch's `AveragedModel`", times[name] / np.median(torch), 0.5)
    page.put("one update", table(["", "time"], rows))


def fit(page: Page) -> None:
    """A fit of ResNet-50."""
    pixels, batch, steps = (32, 8, 4) if page.quick else (224, 128, 12)
    job: Job = {"network": ["application", "ResNet50", pixels], "batch": batch, "steps": steps}
    job |= {"replicas": 1, "clock": "gpu", "policy": "mixed_bfloat16", "gpu": True}
    rows = []
    for version, legacy in KERAS_VERSIONS.items():
        parts = fit_ours(**job, epochs=4, start=2, legacy=legacy)
        fits = isolated.call(training.fits, [PLAIN, UPDATE], **job, epochs=2, legacy=legacy)
        plain, updated = (np.array(fits[what][0]["times"][1][1:-1]) for what in fits)
        steps_of = (ms(seconds) for seconds in (parts["training"], parts["pass"], updated))
        once = (s(parts[part]) for part in ("first", "hooks", "bn", "end"))
        rows.append([version, *steps_of, spread(updated / np.median(plain)), *once])
    header = ["Keras", "training step", "step of the BN pass", "step with an update"]
    header += ["with / without", "first training step", "SWA's hooks, in all"]
    page.put("fit", table([*header, "first step of the BN pass", "end of the BN pass"], rows))


if __name__ == "__main__":
    main()
