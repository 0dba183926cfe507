"""Training steps that write weights: whether that disturbs the BN pass is noticed."""

import pytest
import tensorflow as tf

from swa_dist import update_bn
from tests.helpers.assertions import assert_bitwise, assert_variance, assert_weights
from tests.helpers.callbacks import at
from tests.helpers.data import batched, data, positions
from tests.helpers.devices import NO_STRATEGY
from tests.helpers.fits import fit
from tests.helpers.models import RATE

pytestmark = pytest.mark.either_keras

NOTICED = r"changes weights by other means.*`update_bn\(model, data\)` after `fit`"


def sharpness_aware(model, x, y, gradients):
    """Perturb by adding and subtracting: rounding leaves traces. (Foret et al., 2021)"""
    first = gradients()
    step = 0.5 / tf.linalg.global_norm(first)
    for weight, gradient in zip(model.tensors, first, strict=True):
        weight.assign_add(step * gradient)
    second = gradients()
    for weight, gradient in zip(model.tensors, first, strict=True):
        weight.assign_sub(step * gradient)
    return second


def adversarial(model, x, y, gradients):
    """Perturb and put a copy back: nothing is left to be seen. (Wu et al., 2020)"""
    copies = [tf.identity(weight) for weight in model.tensors]
    for weight in model.tensors:
        weight.assign(1.1 * weight)
    result = gradients()
    for weight, copy in zip(model.tensors, copies, strict=True):
        weight.assign(copy)
    return result


def one_layer(model, x, y, gradients):
    """Perturb one weight, by the name that Keras gives it. (Miyato et al., 2017)"""
    kernel = model.layers[0].kernel
    copy = tf.identity(kernel)
    kernel.assign(kernel + 0.1)
    result = gradients()
    kernel.assign(copy)
    return result


def moving_after_the_step(model, x, y, gradients):
    result = gradients()
    model.tensors[0].assign(0.99 * model.tensors[0])
    return result


def moving_by_a_bare_operation(model, x, y, gradients):
    """Past the methods of the weight: only what it is at the end of the pass tells."""
    result = gradients()
    weight = model.tensors[0]
    tf.raw_ops.AssignVariableOp(resource=weight.handle, value=0.99 * weight)
    return result


def clipping_what_is_small(model, x, y, gradients):
    for weight in model.tensors:
        weight.assign(tf.clip_by_value(weight, -1e3, 1e3))
    return gradients()


def of_a_teacher(model, x, y, gradients):
    model.teacher.assign(0.9 * model.teacher + 0.1 * model.tensors[0])
    return gradients()


def perturbing(kit, perturb, strategy=NO_STRATEGY, **arguments):
    layers = kit.keras.layers

    class Perturbing(kit.keras.Sequential):
        def train_step(self, fed):
            x, y = fed

            def gradients():
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
                return tape.gradient(loss, self.tensors)

            pairs = zip(perturb(self, x, y, gradients), self.trainable_variables, strict=True)
            self.optimizer.apply_gradients(pairs)
            return {"samples": tf.shape(x)[0]}

    with strategy.scope():
        model = Perturbing(
            [layers.Input((3,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)]
        )
        model.compile(kit.keras.optimizers.SGD(1e-4), "mse", jit_compile=False, **arguments)
        model.tensors = [kit.tensor(v) for v in model.trainable_variables]
        model.teacher = tf.Variable(tf.zeros_like(model.tensors[0]), trainable=False)
    return model


def assert_averaged(kit, model):
    recorder, *_ = fit(kit, model, fed=batched(*data()), epochs=4)
    assert_weights(kit.trainable(model), recorder.mean(2, 3))


def variance_of(kit, model):
    kernel, bias = (kit.array(v).astype("float64") for v in model.layers[0].weights)
    return (positions(data()[0]) @ kernel + bias).var(0)


@pytest.mark.parametrize(
    "perturb",
    [sharpness_aware, adversarial, one_layer, moving_after_the_step, moving_by_a_bare_operation],
)
def test_weights_that_move_within_the_step_are_noticed(kit, perturb):
    model = perturbing(kit, perturb)
    with pytest.warns(UserWarning, match=NOTICED):
        assert_averaged(kit, model)


def test_on_replicas_and_with_several_steps_an_execution(kit, two_replicas):
    model = perturbing(kit, adversarial, two_replicas, steps_per_execution=3)
    with pytest.warns(UserWarning, match=NOTICED):
        assert_averaged(kit, model)
    kit.assert_replicas_agree(model)


def test_in_eager_steps(kit):
    with pytest.warns(UserWarning, match=NOTICED):
        assert_averaged(kit, perturbing(kit, adversarial, run_eagerly=True))


def test_the_remedy_gives_exact_statistics(kit):
    model = perturbing(kit, sharpness_aware)
    with pytest.warns(UserWarning, match=NOTICED):
        assert_averaged(kit, model)
    update_bn(model, data()[0])
    assert_variance(kit.statistics(model.layers[1])[1], variance_of(kit, model))


@pytest.mark.parametrize("harmless", [clipping_what_is_small, of_a_teacher])
def test_writes_that_move_no_averaged_weight_are_none_of_it(kit, harmless):
    model = perturbing(kit, harmless)
    assert_averaged(kit, model)  # a warning would be an error
    assert_variance(kit.statistics(model.layers[1])[1], variance_of(kit, model))


def test_weights_that_a_training_step_writes_are_the_average_again_after_the_pass(kit):
    class Writing(kit.keras.Sequential):
        def train_step(self, fed):
            logs = super().train_step(fed)
            self.trainable_variables[-1].assign(self.trainable_variables[-1] + 1.0)
            return logs

    layers = [kit.keras.layers.BatchNormalization(), kit.keras.layers.Dense(1)]
    model = Writing([kit.keras.layers.Input((3,)), *layers])
    model.compile(kit.keras.optimizers.SGD(RATE, momentum=0.9), "mse", jit_compile=False)
    seen = []
    look = at(kit, 5, lambda model: seen.extend(kit.trainable(model)))
    with pytest.warns(UserWarning, match="changes weights by other means"):
        recorder, *_ = fit(kit, model, before=[look], epochs=5)
    assert_weights(seen, recorder.mean(2, 3, 4))
    assert_bitwise(seen, kit.trainable(model))
