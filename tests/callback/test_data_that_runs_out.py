import pytest
import tensorflow as tf

from tests.helpers.assertions import (
    Statistics,
    assert_bitwise,
    assert_exact,
    assert_trains_on,
    assert_undisturbed,
    assert_weights,
)
from tests.helpers.callbacks import at
from tests.helpers.data import data, positions
from tests.helpers.fits import fit
from tests.helpers.marks import ran_out
from tests.helpers.models import build

pytestmark = pytest.mark.either_keras


def batches_of(epochs):
    """A dataset whose iterators give these numbers of batches of 8, one iterator after another."""
    x, y = data()
    left = iter(epochs)

    def generate():
        for i in range(next(left, 0)):
            yield x[8 * i : 8 * i + 8].copy(), y[8 * i : 8 * i + 8].copy()

    signature = (tf.TensorSpec((None, 3)), tf.TensorSpec((None, 1)))
    return tf.data.Dataset.from_generator(generate, output_signature=signature)


@ran_out
def test_a_pass_over_less_data_ends_with_it_and_has_its_statistics(kit):
    model, seen = build(kit), []
    look = at(kit, 5, lambda model: seen.extend(model.get_weights()))
    recorder, *_ = fit(kit, model, before=[look], epochs=5, fed=batches_of([3, 3, 3, 3, 2]))
    assert_bitwise(seen, model.get_weights())
    assert_exact(kit, model, recorder, [2, 3, 4], seen=positions(data()[0][:16]))


@ran_out
def test_a_pass_without_data_leaves_the_average_and_says_so(kit):
    model = build(kit)
    kept = Statistics(kit, 2, 3, 4)
    fed = batches_of([3, 3, 3, 3, 0])
    with pytest.warns(UserWarning, match="there was no data in the BN pass"):
        recorder, *_ = fit(kit, model, before=[kept.callback], epochs=5, fed=fed)
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4))
    kept.assert_averaged(kit, model)
    assert_undisturbed(kit, model)
    assert_trains_on(kit, model)


@ran_out
def test_data_that_runs_out_before_the_pass(kit, two_replicas):
    fed = tf.data.Dataset.from_tensor_slices(data()).batch(8).repeat(4)
    model = build(kit, two_replicas)
    if kit.name == "keras3":  # which begins the data anew
        recorder, *_ = fit(kit, model, fed=fed, steps_per_epoch=3, epochs=6)
        assert_exact(kit, model, recorder, range(2, 6))
        return
    kept = Statistics(kit, 2, 3, 4)
    with pytest.warns(UserWarning, match="the data ran out.* let `fit` have data for every epoch"):
        recorder, *_ = fit(kit, model, before=[kept.callback], fed=fed, steps_per_epoch=3, epochs=6)
    # tf_keras learns in epoch 5 that there is no more: at its end the weights are as before.
    assert_weights(kit.trainable(model), recorder.mean(2, 3, 4, 5))
    assert_undisturbed(kit, model)
    assert_trains_on(kit, model)
