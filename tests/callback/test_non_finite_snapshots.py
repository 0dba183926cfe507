"""What is not finite does not enter the average."""

import numpy as np
import pytest

from swa_dist import SWAWarning
from tests.helpers.assertions import assert_bitwise, assert_exact
from tests.helpers.callbacks import at, stop
from tests.helpers.data import data
from tests.helpers.fits import fit
from tests.helpers.marks import ran_out
from tests.helpers.models import build, norm_of, poison

pytestmark = pytest.mark.either_keras


def test_statistics_that_are_not_finite_on_a_replica_do_not_enter_the_average(kit, two_replicas):
    def spoil(model):
        variable = kit.tensor(norm_of(model).moving_mean)
        variable.values[0].assign([np.nan, 1, 1])

    def keep(model):
        kept.append([kit.replicas(v)[1] for v in norm_of(model).non_trainable_variables])

    kept = []
    model = build(kit, two_replicas)
    with pytest.warns(UserWarning, match="were not recomputed"):
        fit(kit, model, before=[at(kit, 2, keep), at(kit, 2, spoil)], after=[at(kit, 2, stop)])
    assert_bitwise(kit.statistics(norm_of(model)), kept[0])


def test_what_is_not_finite_is_not_averaged_and_terminate_on_nan_ends_finite(kit, two_replicas):
    model = build(kit, two_replicas)
    terminate = kit.keras.callbacks.TerminateOnNaN()
    with pytest.warns(UserWarning, match="are not finite") as warned:
        recorder, swa, history = fit(
            kit, model, before=[terminate, at(kit, 4, poison, "on_train_batch_begin")]
        )
    assert len(history["loss"]) == 5
    assert swa.n_averaged == 2
    assert np.isnan(recorder.weights[3][-1]).all()
    message = str(warned.pop(UserWarning).message)
    name = getattr(model.trainable_variables[0], "path", model.trainable_variables[0].name)
    for words in ("end of epoch 4", "has 2 snapshots", repr(name), "lower the learning rate"):
        assert words in message
    assert_exact(kit, model, recorder, [2, 3])


@ran_out
def test_a_replica_without_samples_is_named_as_the_cause(kit, two_replicas):
    model = build(kit, two_replicas)
    if kit.name == "tf_keras":  # which trains on
        fit(kit, model, fed=data(9), batch_size=8, epochs=3)
        return
    message = r"fewer samples than there are replicas|no snapshot"
    with pytest.warns(UserWarning, match=message) as all_:
        fit(kit, model, fed=data(9), batch_size=8, epochs=3)
    assert len([w for w in all_ if w.category is SWAWarning]) == 2  # NumPy may warn of Keras


def test_the_name_of_what_is_not_finite_is_right_after_a_layer_was_frozen(kit):
    def freeze(model):
        model.layers[0].trainable = False

    model = build(kit)
    with pytest.warns(UserWarning, match=r"are not finite.*dense.*/bias"):
        fit(
            kit, model,
            before=[at(kit, 3, freeze, "on_epoch_begin"), at(kit, 4, poison)], epochs=5,
        )  # fmt: skip
